"""How a folder is written into scripts: whatever it is called, every command takes it for a folder."""

from plans.errors import UsageError, printable


def spelled(directory: str) -> str:
    """Return a folder as an argument that no command takes for an option.

    Raises:
        UsageError: no name at all, or one that a text file cannot hold.

    Example:
        >>> spelled("shards/"), spelled("-shards")
        ('shards/', './-shards')
    """
    if not directory:
        raise UsageError("--directory is empty", expected="the folder of the export, such as shards/")
    try:
        directory.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"--directory '{printable(directory)}' is not UTF-8", hint="scripts are UTF-8: rename the folder"
        ) from None
    return f"./{directory}" if directory.startswith("-") else directory


def beside(directory: str, *, suffix: str) -> str:
    """Return a file beside a folder, with its name and a suffix; inside it where the folder is not called by a name.

    Example:
        >>> beside("a/shards/", suffix=".gguf"), beside("/", suffix=".gguf"), beside("..", suffix=".gguf")
        ('a/shards.gguf', '/model.gguf', '../model.gguf')
    """
    path = directory.rstrip("/")
    is_named = path.rpartition("/")[2] not in ("", ".", "..")
    return path + suffix if is_named else f"{path}/model{suffix}"
