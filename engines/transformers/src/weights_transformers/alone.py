# SPDX-License-Identifier: Apache-2.0
"""One thread at a time where Transformers, accelerate and diffusers patch what all threads use."""

from __future__ import annotations

import threading

ALONE = threading.RLock()
"""Held while a model is built or tied.

`from_pretrained` replaces functions of torch and methods of all models, and then puts back what it found.
Two threads that do so at once leave a process in which heads are never tied and stay without memory.
"""
