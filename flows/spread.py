"""`fromscratch spread`: move the shards of packed rows to other disks and stores, and back."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from llm.artifact import MANIFEST
from llm.errors import ConfigError
from llm.storage.spread import STAGE, bring_back, spread
from tasks.store import Store


def move_shards(store: Store, artifact: str, places: Sequence[str], *, is_back: bool) -> None:
    """Spread an artifact, named by its folder or the beginning of its digest, over `places`.

    Raises:
        ConfigError: there is no such artifact, or neither places nor `is_back` are given.
        PlaceError, ArtifactError: as `llm.storage.spread`.
    """
    if is_back == bool(places):
        raise ConfigError("expected places to move to (folders or URLs), or --back")
    folder = find_rows(store, artifact)
    with store.lock(f"spread-{folder.name}"), Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(folder.name)
        for moved in bring_back(folder) if is_back else spread(folder, places):
            progress.update(bar, completed=moved.done_bytes, total=moved.total_bytes)
            progress.console.print(f"{moved.shard}  {moved.place}", soft_wrap=True)


def find_rows(store: Store, artifact: str) -> Path:
    """Return the folder of packed rows, given it or the beginning of their digest.

    Raises:
        ConfigError: there is none such, or several.
    """
    if (Path(artifact) / MANIFEST).is_file():
        return Path(artifact)
    known = store.artifacts([STAGE])
    found = [folder for folder in known if artifact and folder.name.startswith(artifact)]
    if len(found) != 1:
        listed = ", ".join(folder.name for folder in known) or "none"
        raise ConfigError(
            f"{artifact}: found {len(found)} such artifacts of pack in {store.root}, expected"
            f" one; there are {listed}"
        )
    return found[0]
