"""The figures of the paper (arXiv 2510.19640), in percent."""

IMAGE_COLUMNS = ("dtd", "eurosat", "gtsrb", "resisc45", "sun397", "svhn")
QUESTION_COLUMNS = (
    "piqa",
    "social_i_qa",
    "ARC-Challenge",
    "ARC-Easy",
    "openbookqa",
    "hellaswag",
    "winogrande",
)


def row(columns, *figures):
    return dict(zip(columns, figures))


# By table, method and column. A mean stands alone where it is all there is.
FIGURES = {
    "image_classification": {
        "full_fine_tuning": row(
            IMAGE_COLUMNS, 78.12, 98.30, 98.85, 94.35, 69.34, 97.34
        ),
        "lora": row(IMAGE_COLUMNS, 74.65, 97.28, 96.95, 90.11, 71.11, 94.22),
        "dora": row(IMAGE_COLUMNS, 75.74, 97.28, 97.27, 91.72, 71.53, 96.41),
        "vae2lat": {"mean": 86.43},
        "beta_vae2lat": {"mean": 87.29},
        "fvae_lora": row(
            IMAGE_COLUMNS, 78.19, 97.78, 97.98, 93.57, 73.14, 96.55
        ),
    },
    "commonsense_reasoning": {
        "lora": row(
            QUESTION_COLUMNS, 80.74, 75.59, 67.58, 82.11, 75.20, 85.73, 77.82
        ),
        "hira": row(
            QUESTION_COLUMNS, 88.63, 80.40, 81.66, 93.56, 87.20, 94.48, 85.87
        ),
        "fvae_lora": row(
            QUESTION_COLUMNS, 88.96, 81.58, 81.06, 92.72, 86.20, 95.30, 88.95
        ),
    },
    "phoneme_recognition": {
        "full_fine_tuning": {"timit": 7.48},
        "lora": {"timit": 9.38},
        "fvae_lora": {"timit": 8.09},
    },
    "spurious_correlations": {
        "lora": row(
            ("spuco_animals", "waterbirds", "celeb_a"), 54.79, 75.49, 40.00
        ),
        "fvae_lora": row(
            ("spuco_animals", "waterbirds", "celeb_a"), 62.0, 75.85, 43.33
        ),
    },
}
