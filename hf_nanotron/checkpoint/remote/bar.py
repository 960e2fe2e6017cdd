"""A progress bar over the checkpoints that wait for their upload."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm

from .upload import Uploader


class UploadBar:
    """A progress bar over the bytes that wait for their upload; none where nothing waits."""

    def __init__(self, uploader: Uploader | None, disable: bool | None = None) -> None:
        self._uploader, self._disable = uploader, disable
        self._bar: Any = None
        self._before = 0  # bytes that were uploaded before the waiting began

    def __enter__(self) -> UploadBar:
        if self._uploader is not None and self._uploader.is_busy:
            sent, total = self._uploader.progress()
            self._before = self._uploader.figures.bytes
            self._bar = tqdm(
                desc=f"uploading to {self._uploader.store.url}",
                total=total - self._before,
                initial=sent - self._before,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=self._disable,
            )
        return self

    def show(self) -> None:
        """Bring the bar up to date."""
        if self._bar is None or self._uploader is None:
            return
        sent, total = self._uploader.progress()
        self._bar.total, self._bar.n = total - self._before, sent - self._before
        failing = self._uploader.store.retry.failing_seconds
        self._bar.set_postfix_str(f"no response from the store for {failing:.0f} s" if failing else "")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self.show()
            self._bar.close()
