"""The section `dataset`: which images, and how they are made or read."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from nrcg.config.basics import Fraction, Name, Positive, Preprocessing, Section, Seed


class DataSection(Section):
    """Which images, and how they are made or read: what every source has in common."""

    name: Name = Field(description="Folder below data/. Experiments with equal data may share it.")
    image_size: Annotated[int, Field(ge=8)] = Field(description="Height and width in pixels.")
    classes: Annotated[list[str], Field(min_length=2)] = Field(description="Class names; label = position.")

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a class is listed twice")
        return self


class SportBallsData(DataSection):
    """Balls on a white canvas, drawn by nrcg.data.sportballs."""

    source: Literal["sportballs"] = Field(description="Drawn here; nothing to download.")
    num_train: Positive = Field(description="Number of training images.")
    num_val: Positive = Field(description="Number of validation images.")
    diameter: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        description="Smallest and largest ball diameter as a share of the canvas."
    )
    seed: Seed = Field(description="Image i depends on (seed, i) alone.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        # The list repeats nrcg.data.sportballs.CLASSES: a test keeps the two in step.
        allowed = ["baseball", "basketball", "soccer", "volleyball"]
        for name in self.classes:
            if name not in allowed:
                raise ValueError(f"classes: {name!r} is no SportBalls class; allowed: {', '.join(allowed)}")
        low, high = self.diameter
        if not 0 < low <= high <= 1:
            raise ValueError("diameter: two shares of the canvas, 0 < smallest <= largest <= 1")
        return self


class DigitsData(DataSection):
    """Scikit-learn's 1,797 real handwritten digits (8 x 8, 17 grey levels), resized."""

    path: ClassVar[str] = "scikit-learn"
    preprocessing: ClassVar[Preprocessing] = "squash"
    max_unreadable: ClassVar[float] = 0.0
    num_train: ClassVar[None] = None
    num_val: ClassVar[None] = None

    source: Literal["digits"] = Field(description="Comes with scikit-learn; nothing to download.")
    classes: Annotated[list[str], Field(min_length=10, max_length=10)] = Field(
        default=[*"0123456789"], description="Names for the digits 0 to 9, in this order."
    )
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="Share of each digit that validates."
    )
    seed: Seed = Field(default=0, description="Seed of the images' order and of the split.")


class ImageData(DataSection):
    """Images that are read from files: what the sources below have in common."""

    path: Annotated[str, Field(min_length=1)] = Field(
        description="Folder of the raw files, relative to the working directory."
    )
    preprocessing: Preprocessing = Field(
        default="center_crop",
        description="How an image becomes square: squash resizes both sides, center_crop first cuts out the largest"
        " centred square. Resized by Pillow's antialiased bilinear filter.",
    )
    num_train: Positive | None = Field(default=None, description="Only so many training images; null: all.")
    num_val: Positive | None = Field(default=None, description="Only so many validation images; null: all.")
    max_unreadable: Fraction = Field(
        default=0.0, description="Largest share of image files that may be unreadable; they are listed and left out."
    )


class CelebAData(ImageData):
    """CelebA, aligned and cropped, with its official splits; labelled by one of its 40 attributes."""

    source: Literal["celeba"] = Field(description="img_align_celeba (folder or zip) and its two lists.")
    preprocessing: Preprocessing = Field(
        default="squash",
        description="squash: 178 x 218 to a square, as published; center_crop: the middle 178 x 178 first, the usual"
        " protocol elsewhere. Resized by Pillow's antialiased bilinear filter.",
    )
    classes: Annotated[list[str], Field(min_length=2, max_length=2)] = Field(
        description="Names for the images without and with the attribute, in this order."
    )
    attribute: str = Field(description="A column of list_attr_celeba.txt, such as Male.")
    download: bool = Field(default=True, description="Fetch what is missing, where gdown and the network are at hand.")


class HuggingFaceData(ImageData):
    """Parquet files as the Hugging Face hub holds them: a column of images and one of labels."""

    source: Literal["huggingface"] = Field(description="Parquet files, on disk or from a hub id.")
    hub_id: str | None = Field(default=None, description="Data set to fetch into path if no parquet file is there.")
    revision: str | None = Field(default=None, description="Branch or commit of hub_id; null: the newest.")
    image_column: str = Field(default="image", description="Encoded images: struct{bytes, path} or binary.")
    label_column: str = Field(
        default="label", description="Class numbers (by the ClassLabel's names, if any) or names."
    )
    train_split: str = Field(default="train", description="Files of this split train, such as train-00000-of-00006.")
    val_split: str | None = Field(
        default="validation", description="Files of this split validate; null: val_share of the training split."
    )
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of each class that validates, where val_split is null."
    )
    seed: Seed = Field(default=0, description="Seed of the images' order and of the split.")


class FolderData(ImageData):
    """One's own images: a folder per class, or one folder and a CSV file of labels."""

    source: Literal["folder"] = Field(description="Image files: a folder per class, or one folder and a CSV of labels.")
    max_unreadable: Fraction = Field(
        default=0.01, description="Largest share of image files that may be unreadable; they are listed and left out."
    )
    labels: str | None = Field(
        default=None, description="CSV file with a header, relative to path; null: each class has a folder of its name."
    )
    image_column: str = Field(default="image", description="Column of the CSV: file names relative to path.")
    label_column: str = Field(default="label", description="Column of the CSV: class names, or positions in classes.")
    split_column: str | None = Field(
        default=None, description="Column of the CSV that says train or val; null: split by val_share and seed."
    )
    image_suffix: str = Field(default="", description="Added to the CSV's file names, such as .jpg.")
    val_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1, description="Share of each class that validates, where no split is given."
    )
    seed: Seed = Field(default=0, description="Seed of the images' order and of the split.")


DatasetConfig = Annotated[
    SportBallsData | DigitsData | CelebAData | HuggingFaceData | FolderData,
    Field(discriminator="source", description="Which images, and how they are made or read."),
]
