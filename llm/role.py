"""The role of a pipeline step: a dataset, or one source of it (`corpus.sources.0`)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Role:
    """The part of `download` that a step works on. `str` gives its dotted path."""

    name: str = ""
    """Of a dataset: `corpus`, `chats-math`; empty for a stage that runs once."""
    source: int | None = None
    """Index in `download.<name>.sources`; None for the whole."""

    def __str__(self) -> str:
        return self.name if self.source is None else f"{self.name}.sources.{self.source}"

    @classmethod
    def parse(cls, text: str) -> "Role":
        """Read what `str` wrote."""
        name, _, index = text.partition(".sources.")
        return cls(name, int(index) if index else None)
