"""Images and labels in parquet files of the Hugging Face hub."""

import io

import PIL.Image
import pyarrow.parquet
import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts
from examples.paper.builders.checks import find_manual_files


def download_instructions(name, repository):
    """How to download a data set by hand.

    No commit is pinned, because none is known here. The counts are checked.

    Args:
        name: String, the name of the builder.
        repository: String, the data set on the Hugging Face hub.
    """
    return f"""\
The folder MANUAL_DIR/{name} must hold the files data/train-*.parquet and
data/test-*.parquet of https://huggingface.co/datasets/{repository}
(licence: not known, see there). This command downloads them:

hf download {repository} --repo-type dataset --include "data/t*.parquet" \
--local-dir MANUAL_DIR/{name}

To get the same files again, add --revision and the commit. MANUAL_DIR is
the `manual_dir` of `tfds.download.DownloadConfig`, by default
~/tensorflow_datasets/downloads/manual.
"""


class ParquetImages(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads the splits `train` and `test` from columns `image` and `label`."""

    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager):
        paths = {
            split: find_manual_files(
                self, dl_manager, f"data/{split}-*.parquet"
            )
            for split in ("train", "test")
        }
        files = {
            split: [pyarrow.parquet.ParquetFile(path) for path in paths[split]]
            for split in paths
        }
        check_counts(
            self,
            {
                split: sum(file.metadata.num_rows for file in files[split])
                for split in files
            },
        )
        return {split: self._generate_examples(files[split]) for split in files}

    def _generate_examples(self, files):
        index = 0
        for file in files:
            # Few at a time, because images of SUN397 are large.
            for batch in file.iter_batches(100, columns=["image", "label"]):
                for row in batch.to_pylist():
                    yield (
                        index,
                        {
                            "image": as_jpeg_or_png(row["image"]["bytes"]),
                            "label": row["label"],
                        },
                    )
                    index += 1


def as_jpeg_or_png(data):
    """Makes sure that TensorFlow decodes an image, and to three axes.

    A few of SUN397's are GIF or BMP, whatever their names say. Others are not
    encoded again.

    Args:
        data: Bytes of an image file.

    Returns:
        The same bytes, or else a `PIL.Image.Image`.
    """
    image = PIL.Image.open(io.BytesIO(data))
    return data if image.format in ("JPEG", "PNG") else image.convert("RGB")
