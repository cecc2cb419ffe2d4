"""Checkpoints of a training run: the last few are kept, and the run goes on from the latest."""

from __future__ import annotations

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from torchax.errors import CheckpointError

from . import _folder
from ._nest import describe
from ._saving import unfinished


class CheckpointManager:
    """A folder of checkpoints by step, ``PATH/STEP``, of which the latest are kept. A context manager; leaving it waits.

    It is orbax's manager with `save_checkpoint`'s states: a step is there only once it is complete, an older one is removed only
    after that, and what a killed process left half-written is removed when a manager is next made.

    Args:
        path: the folder; made if missing.
        keep: how many checkpoints are kept; None keeps all.
        wait: False writes in the background: `save` gives control back as soon as the values have been copied.
    """

    def __init__(self, path: str | os.PathLike[str], keep: int | None = 3, *, wait: bool = True):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None to keep all checkpoints; got {keep}")
        from . import _local

        self.path = _local(path).absolute()
        self._wait = wait
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, atomicity_options=_folder.ATOMIC, save_root_metadata=False
        )
        with _folder.quiet():
            self._manager = ocp.CheckpointManager(
                self.path,
                options=options,
                item_handlers={"arrays": ocp.PyTreeCheckpointHandler(), "tree": ocp.JsonCheckpointHandler()},
            )

    def save(self, step: int, state: Any) -> None:
        """Write `state`, a nest as for `save_checkpoint`, as number `step`, then remove those that are not kept.

        Raises:
            CheckpointError: the step is there already, or a value cannot be saved.
            Exception: the previous save, in the background, failed.
        """
        if step in self.all_steps():
            raise CheckpointError(
                f"{self.path} has a checkpoint of step {step} already; give another step, or delete that one"
            )
        described = describe(state)
        with _folder.quiet(), jax.enable_x64(True):
            self._manager.save(step, args=_folder.arguments(described.tree, described.tensors), force=True)
        if self._wait:
            self.wait()
        else:
            unfinished.add(self)

    def restore(self, step: int | None = None, target: Any = None, **options: Any) -> Any:
        """What was saved, the latest if no step is given. `target` and `options` are `load_checkpoint`'s.

        Raises:
            CheckpointError: there is none, it is damaged, or it does not fit `target`.
        """
        from . import load_checkpoint

        self.wait()
        if step is None and self.latest_step() is None:
            raise CheckpointError(f"there is no checkpoint in {self.path} yet")
        return load_checkpoint(self.path, target, self.latest_step() if step is None else step, **options)

    def resume(self, target: Any = None, **options: Any) -> tuple[int, Any] | None:
        """``(step, state)`` of the latest checkpoint; None where there is none, at the beginning of a run."""
        self.wait()
        step = self.latest_step()
        return None if step is None else (step, self.restore(step, target, **options))

    def latest_step(self) -> int | None:
        """The number of the latest checkpoint, None if there is none."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """The numbers of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def delete(self, step: int) -> None:
        """Remove a checkpoint."""
        self.wait()
        self._manager.delete(step)

    def wait(self) -> None:
        """Until the save in the background, if there is one, is complete; raises what went wrong in it."""
        with _folder.quiet():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and end orbax's threads."""
        with _folder.quiet():
            self._manager.wait_until_finished()
            self._manager.close()
        unfinished.discard(self)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
