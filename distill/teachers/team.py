"""What a fit needs of the processes that share it: `robx.distill.training.processes.Processes` offers it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Team(Protocol):
    """The processes that work on one fit. All of them have to call each method, in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def world(self) -> int:
        """The number of processes."""

    def sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes."""

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, by rank."""


class Alone:
    """One process: a Team of its own."""

    rank, world = 0, 1

    def sum(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def gather(self, value: Any) -> list[Any]:
        """This process's value."""
        return [value]
