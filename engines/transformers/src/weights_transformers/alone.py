# SPDX-License-Identifier: Apache-2.0
"""One thread at a time where Transformers, accelerate and diffusers patch what all threads use."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

ALONE = threading.RLock()
"""Held while a model is built or tied.

`from_pretrained` replaces functions of torch and methods of all models, and then puts back what it found.
Two threads that do so at once leave a process in which heads are never tied and stay without memory.
"""

_SWITCH = "HF_DEACTIVATE_ASYNC_LOAD"


@contextlib.contextmanager
def in_one_thread() -> Iterator[None]:
    """Have Transformers start no threads to take what it loads, unless its own switch says otherwise.

    They are there for reading. Where nothing is read, handing each tensor over to one and back takes
    longer than all else that is done with it.
    """
    with ALONE:
        if _SWITCH in os.environ:
            yield
            return
        os.environ[_SWITCH] = "1"
        try:
            yield
        finally:
            os.environ.pop(_SWITCH, None)
