"""Names of files that come from a file of somebody else's."""

from pathlib import Path, PurePosixPath

from cosup_jax.errors import UserError


def inside(directory: Path, name: str) -> Path:
    """`directory / name`. Raises UserError for a name that leads out of the directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise UserError(f"{directory}: names the file {name!r}, outside of itself; do not trust it")
    return directory / path
