"""What a test, or a job of a worker, may change of its process. It is put back: none depends on what ran before."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Callable

import numpy as np
import torch
from transformers.utils import logging as stock_logging

LOGGERS = ("", "accelerate", "datasets", "hf_nanotron", "huggingface_hub", "torch", "transformers", "trl")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
OWNED = "PYTEST_CURRENT_TEST"  # pytest writes it in the middle of a test


def begin(rank: int = 0) -> None:
    """Random numbers that nobody seeds are the same in every run, whatever ran before, and what is said once is said
    again. Numbers of `random` differ by rank, as they do in processes of their own."""
    stock_logging.warning_once.cache_clear()
    stock_logging.info_once.cache_clear()
    random.seed(rank)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)


def remember() -> Callable[[], None]:
    """Call what is returned to put the process back to how it is now. Only in the main thread."""
    environment, folder, path = dict(os.environ), os.getcwd(), list(sys.path)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    logs = [(logger, logger.level, logger.propagate) for logger in loggers]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    exact, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )

    def put_back() -> None:
        for name in os.environ.keys() - environment.keys() - {OWNED}:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if name != OWNED})
        os.chdir(folder)
        sys.path[:] = path
        for logger, level, propagate in logs:
            logger.setLevel(level)
            logger.propagate = propagate
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.are_deterministic_algorithms_enabled() != exact:
            torch.use_deterministic_algorithms(exact, warn_only=warn_only)

    return put_back
