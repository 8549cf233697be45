"""What every builder checks before it writes a single example."""

import pathlib


def find_manual_files(builder, dl_manager, pattern):
    """Finds the files that a user has to download by hand.

    Args:
        builder: `tfds.core.DatasetBuilder`. The files are in the folder of its
            name, inside `manual_dir`.
        dl_manager: `tfds.download.DownloadManager`.
        pattern: String, a glob relative to that folder.

    Returns:
        Sorted list of `pathlib.Path`.

    Raises:
        ValueError: if there are none.
    """
    manual_dir = pathlib.Path(dl_manager.manual_dir)
    paths = sorted((manual_dir / builder.name).glob(pattern))
    if not paths:
        instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS.replace(
            "MANUAL_DIR", str(manual_dir)
        )
        raise ValueError(
            f"{builder.name} found no '{pattern}' in "
            f"{manual_dir / builder.name}.\n{instructions}"
        )
    return paths


def check_counts(builder, found):
    """Checks that a data set is whole.

    Args:
        builder: `tfds.core.DatasetBuilder` with the attribute
            `expected_counts`: dict from the name of a split to the number of
            its examples, or to the numbers of its groups, in their order.
        found: Dict of the same form.

    Raises:
        ValueError: if a split has another number of examples.
    """
    wrong = [
        f"split '{split}' must have {expected} and has {found[split]}"
        for split, expected in builder.expected_counts.items()
        if found[split] != expected
    ]
    if wrong:
        raise ValueError(
            f"The files of {builder.name} hold another number of examples than "
            f"was published: {'; '.join(wrong)}. Delete them and download them "
            "again."
        )
