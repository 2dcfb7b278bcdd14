"""Names of files: those that the user gives, and those that a file of somebody else's does."""

from pathlib import Path, PurePosixPath

from cosup_jax.errors import UserError


def inside(directory: Path, name: str) -> Path:
    """`directory / name`. Raises UserError for a name that leads out of the directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise UserError(f"{directory}: names the file {name!r}, outside of itself; do not trust it")
    return directory / path


def expanded(name: str | Path) -> Path:
    """The path, a leading ~ or ~user read as that home. Raises UserError for a user unknown."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error}") from None
