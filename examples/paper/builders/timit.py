"""TIMIT, read speech with its phones."""

import numpy as np
import tensorflow_datasets as tfds

from examples.paper.builders.checks import check_counts
from examples.paper.builders.checks import find_manual_files

SAMPLE_RATE = 16_000
# The 39 phones that results are given in, after [Lee and Hon](
# https://doi.org/10.1109/29.46546).
PHONES = (
    "aa ae ah aw ay b ch d dh dx eh er ey f g hh ih iy jh k l m n ng ow oy p r "
    "s sh sil t th uh uw v w y z"
)
# What the other phones of the transcripts are taken for. The glottal stop,
# "q", is left out.
FOLDED = {
    "ao": "aa",
    "ax": "ah",
    "ax-h": "ah",
    "axr": "er",
    "el": "l",
    "em": "m",
    "en": "n",
    "eng": "ng",
    "hv": "hh",
    "ix": "ih",
    "nx": "n",
    "ux": "uw",
    "zh": "sh",
    "bcl": "sil",
    "dcl": "sil",
    "gcl": "sil",
    "kcl": "sil",
    "pcl": "sil",
    "tcl": "sil",
    "epi": "sil",
    "h#": "sil",
    "pau": "sil",
}
# Speakers of the folder TEST: the development set of Kaldi's and SpeechBrain's
# recipes, and the core test set of TIMIT itself.
VALIDATION_SPEAKERS = (
    "fadg0 faks0 fcal1 fcmh0 fdac1 fdms0 fdrw0 fedw0 fgjd0 fjem0 fjmg0 fjsj0 "
    "fkms0 fmah0 fmml0 fnmr0 frew0 fsem0 majc0 mbdg0 mbns0 mbwm0 mcsh0 mdlf0 "
    "mdls0 mdvc0 mers0 mgjf0 mglb0 mgwt0 mjar0 mjfc0 mjsw0 mmdb1 mmdm2 mmjr0 "
    "mmwh0 mpdf0 mrcs0 mreb0 mrjm4 mrjr0 mroa0 mrtk0 mrws1 mtaa0 mtdt0 mteb0 "
    "mthc0 mwjg0"
)
TEST_SPEAKERS = (
    "fdhc0 felc0 fjlm0 fmgd0 fmld0 fnlp0 fpas0 fpkt0 mbpm0 mcmj0 mdab0 mgrt0 "
    "mjdh0 mjln0 mjmp0 mklt0 mlll0 mlnt0 mnjm0 mpam0 mtas1 mtls0 mwbt0 mwew0"
)


class PaperTimit(tfds.core.GeneratorBasedBuilder):
    """Sentences of many speakers, 39 phones.

    The two sentences that every speaker reads, SA1 and SA2, are left out.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
The folder MANUAL_DIR/paper_timit must hold TIMIT's folders TRAIN and TEST, with
their DR*/SPEAKER/*.WAV and *.PHN; they may be deeper inside, and in lower case.
TIMIT is LDC93S1 of the Linguistic Data Consortium, which sells the licence:
https://catalog.ldc.upenn.edu/LDC93S1. Where you have unpacked it, this command
makes it known:

mkdir -p MANUAL_DIR && ln -s /path/to/TIMIT MANUAL_DIR/paper_timit

MANUAL_DIR is the `manual_dir` of `tfds.download.DownloadConfig`, by default
~/tensorflow_datasets/downloads/manual.
"""
    expected_counts = {"train": 3_696, "validation": 400, "test": 192}

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="The TIMIT Acoustic-Phonetic Continuous Speech Corpus.",
            features=tfds.features.FeaturesDict(
                {
                    "audio": tfds.features.Audio(
                        dtype=np.int16, sample_rate=SAMPLE_RATE
                    ),
                    "phones": tfds.features.Sequence(
                        tfds.features.ClassLabel(names=PHONES.split())
                    ),
                    "speaker": tfds.features.Text(),
                    "utterance": tfds.features.Text(),
                }
            ),
            supervised_keys=("audio", "phones"),
            homepage="https://catalog.ldc.upenn.edu/LDC93S1",
            license="LDC User Agreement",
        )

    def _split_generators(self, dl_manager):
        paths = {"train": [], "validation": [], "test": []}
        for path in find_manual_files(self, dl_manager, "**/*.[Ww][Aa][Vv]"):
            split = find_split(path)
            if split is not None:
                paths[split].append(path)
        check_counts(self, {split: len(paths[split]) for split in paths})
        return {split: self._generate_examples(paths[split]) for split in paths}

    def _generate_examples(self, paths):
        for path in paths:
            speaker = path.parent.name.lower()
            utterance = f"{speaker}_{path.stem.lower()}"
            yield (
                utterance,
                {
                    "audio": read_sphere(path),
                    "phones": read_phones(path),
                    "speaker": speaker,
                    "utterance": utterance,
                },
            )


def find_split(path):
    """The split of an utterance, by its path.

    Args:
        path: `pathlib.Path` that ends in TRAIN/DR1/FCJF0/SI1027.WAV or the
            like, in upper or lower case.

    Returns:
        String, or `None` for what belongs to none.
    """
    part, _, speaker, sentence = (name.lower() for name in path.parts[-4:])
    if sentence.startswith("sa"):
        return None
    if part == "train":
        return "train"
    if speaker in VALIDATION_SPEAKERS.split():
        return "validation"
    return "test" if speaker in TEST_SPEAKERS.split() else None


def read_phones(path):
    """The phones of an utterance, folded.

    Args:
        path: `pathlib.Path` of its audio, beside which is the transcript. The
            lines of it are first sample, last sample, phone.

    Returns:
        List of strings.
    """
    suffix = ".PHN" if path.suffix.isupper() else ".phn"
    lines = path.with_suffix(suffix).read_text().splitlines()
    return fold([line.split()[2] for line in lines])


def fold(phones):
    """Takes TIMIT's 61 phones for the 39 that results are given in.

    Silences that come to stand side by side, such as a closure and a pause,
    are one, as in SpeechBrain's recipe.
    """
    folded = [FOLDED.get(phone, phone) for phone in phones if phone != "q"]
    return [
        phone
        for index, phone in enumerate(folded)
        if not (index and phone == folded[index - 1] == "sil")
    ]


def read_sphere(path):
    """Reads a NIST SPHERE file of one channel, in 16-bit PCM.

    Args:
        path: `pathlib.Path`.

    Returns:
        Int16 array of shape `(number of samples,)`.

    Raises:
        ValueError: if the file is of another format, compressed or cut off.
    """
    data = path.read_bytes()
    if not data.startswith(b"NIST_1A"):
        raise ValueError(
            f"{path} is not a NIST SPHERE file. Use TIMIT as the Linguistic "
            "Data Consortium distributes it, not a copy in another format."
        )
    # Two lines, the format and the header's size, then a name, a type and a
    # value in each.
    header_size = int(data[8:16])
    header = data[:header_size].decode("latin-1").partition("end_head")[0]
    fields = [line.split(maxsplit=2) for line in header.splitlines()[2:]]
    fields = {name: value for name, _, value in fields}
    if fields.get("sample_coding", "pcm") != "pcm":
        raise ValueError(
            f"{path} is compressed: its sample_coding is "
            f"'{fields['sample_coding']}'. Decompress it with `sph2pipe -p -f "
            "sph FILE NEW_FILE` and put the new file in its place."
        )
    expected = {
        "channel_count": "1",
        "sample_rate": str(SAMPLE_RATE),
        "sample_n_bytes": "2",
        # The lower byte first.
        "sample_byte_format": "01",
        "sample_count": str((len(data) - header_size) // 2),
    }
    found = {name: fields.get(name) for name in expected}
    if found != expected:
        raise ValueError(
            f"{path} is not whole, or not of TIMIT. Its header must say "
            f"{expected} and says {found}."
        )
    return np.frombuffer(data, "<i2", offset=header_size)
