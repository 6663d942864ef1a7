# SPDX-License-Identifier: Apache-2.0
"""One rank of a tensor-parallel model: loads it, answers, and says in JSON what it read."""

import json
import os
import sys


def main():
    rank, size, port, folder, how, out = sys.argv[1:]
    os.environ.update(
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        OMP_NUM_THREADS="1",
    )
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    given = json.loads(how)
    given |= given.get("only", {}).get(rank, {})
    folder = given.get("folder", folder)
    told = {}
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 199, (2, 17), generator=generator)
    try:
        if given["by"] == "transformers":
            from transformers.distributed import DistributedConfig

            model = AutoModelForCausalLM.from_pretrained(
                folder, distributed_config=DistributedConfig(tp_plan="auto")
            )
        else:
            import weights_core as w
            from weights_transformers import open_engine

            timeout = given.get("timeout", 60.0)
            engine = open_engine(AutoModelForCausalLM, folder, tp_plan="auto", timeout=timeout)
            if given.get("stays_away"):
                sys.stdin.read()
            source = given.get("source", folder)
            with w.open_session(engine, source, given["by"], given.get("config"), timeout=timeout) as session:
                session.resolve()
                session.load()
                if "cut_short" in given:  # once its header was read
                    os.truncate(given["cut_short"], os.stat(given["cut_short"]).st_size - 1)
                session.apply()
                session.publish(w.Layout.SHARDED)
                session.post_load()
                session.publish(w.Layout.FINAL)
                report = session.finish()
            model = engine.model
            told = {"provider": report.provider, "bytes": report.nbytes, "published": len(report.receipts)}
            told |= {"engine": type(engine).__name__, "axes": str(engine.info.topology.axes)}
            told["share"] = sum(local(p).nbytes for p in model.parameters())
        with torch.no_grad():
            answer = model(ids).logits
        torch.save(
            {
                "answer": full(answer),
                "parameters": {name: local(p).clone() for name, p in model.named_parameters()},
                "cut": sorted(name for name, p in model.named_parameters() if hasattr(p, "placements")),
            },
            out,
        )
    except Exception as exc:
        told["error"] = f"{type(exc).__name__}: {exc}"
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    if given.get("wait"):
        sys.stdin.read()
    if dist.is_initialized() and "error" not in told:
        dist.destroy_process_group()


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    main()
