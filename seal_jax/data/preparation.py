"""Find and prepare TFDS data sets on disk, as array_record and without TensorFlow."""

import contextlib
import fcntl
import hashlib
import io
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, TextIO

from seal_jax.core import files
from seal_jax.data import shards
from seal_jax.data.catalogue import RECORDS, builder_record, original_files
from seal_jax.errors import UsageError, nearest


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    manual_dir: str | os.PathLike | None = None,
) -> os.PathLike:
    """Prepare a data set as array_record unless it is already; return the version's folder.

    Args:
      name: ``digits``, a data set that this package builds from original files, such as
        ``tiny_imagenet`` or ``image_folder/eurosat``, or any TFDS name; TFDS downloads the latter,
        which needs network and for many data sets TensorFlow.
      data_dir: where to write, perhaps in a bucket (``gs://``); None is TFDS's default (``TFDS_DATA_DIR``).
      manual_dir: the folder of source files, for data sets that need one.

    Raises:
      UsageError: for an unknown name, a missing or unusable ``manual_dir``, a ``data_dir`` that
        cannot be written, or a download that failed.
    """
    builder, record = find_builder(name, data_dir), builder_record(name)
    root = files.as_path(builder.data_dir_root)
    manual = None if manual_dir is None else os.fspath(manual_dir)
    if manual is not None and files.is_remote(manual):
        raise UsageError(f"manual_dir={manual} is in a bucket: copy it into a local folder")
    if _is_prepared(builder):
        _require_array_record(name, builder)
        if record and record.manual_dir and manual is not None:
            _check_same(builder, Path(manual))
        return builder.data_path

    if record and record.manual_dir:
        if manual is None:
            raise UsageError(
                f"{name} needs {original_files(name)}: run `{prepare_command(name, root)}`"
            )
        # Before anything is written: a folder that cannot be used is the likeliest mistake.
        builder.scan(Path(manual))
    if files.is_remote(root):
        files.check_writable(root, "data_dir")
        # Array_record is written to local files only.
        with files.temporary_folder("seal_jax-prepare-") as local:
            folder = Path(prepare(name, data_dir=local, manual_dir=manual_dir))
            _copy(folder, root / folder.relative_to(local))
        return builder.data_path
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not _is_writable(root):
            raise PermissionError
    except OSError as error:
        raise UsageError(
            f"data_dir={root} cannot be written: give --data-dir (or TFDS_DATA_DIR) another folder"
        ) from error
    try:
        if record:
            _prepare_beside(name, builder, manual, progress=bool(record.manual_dir))
        else:
            _generate(builder, manual, progress=True)
    except UsageError:
        raise
    # Downloads and other people's builders fail in any way.
    except Exception as error:
        hint = "" if record else f": {_elsewhere_hint(name, root)}"
        raise UsageError(
            f"{name} could not be prepared in {root}: {first_line(error)}{hint}"
        ) from error
    return builder.data_path


def open_prepared(name: str, data_dir: str | os.PathLike | None) -> Any:
    """Return the builder of prepared data; ``digits`` is prepared where it is missing.

    Data in a bucket is copied into the user's cache, since array_record is read from local files only.

    Raises:
      UsageError: where it is missing (with the command that prepares it) or needs TensorFlow.
    """
    builder, record = find_builder(name, data_dir), builder_record(name)
    remote = files.is_remote(builder.data_dir_root)
    if not _is_prepared(builder) and record and not record.manual_dir and not remote:
        if data_dir and not Path(data_dir).exists():
            # Otherwise a typo would make a folder, and prepare the data there.
            raise UsageError(f"data.data_dir={data_dir} does not exist: make it, or leave it out")
        if not data_dir and not _is_writable(Path(builder.data_dir_root)):
            # TFDS_DATA_DIR often names a shared folder of other data; ours needs no room in it.
            data_dir = _cache() / "tfds"
        prepare(name, data_dir=data_dir)
        builder = find_builder(name, data_dir)
    if not _is_prepared(builder):
        root = builder.data_dir_root
        originals = original_files(name)
        needs = f" with {originals} as FOLDER" if originals else ""
        hint = "" if record else f"; without network: {_elsewhere_hint(name, root)}"
        raise UsageError(
            f"{name} is not prepared in {builder.data_dir}: run `{prepare_command(name, root)}`"
            f"{needs}{hint}"
        )
    _require_array_record(name, builder)
    return find_builder(name, _copy_of(builder)) if remote else builder


def _copy_of(builder: Any) -> Path:
    """Return a folder in the user's cache with a copy of a version that is prepared in a bucket."""
    version = files.as_path(builder.data_dir)
    # With the times of the objects: data that was prepared again is copied again.
    identity = f"{version} {shards.fingerprint(version, times=True)}"
    root = _cache() / "copies" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    place = version.relative_to(files.as_path(builder.data_dir_root))
    try:
        if (root / place).exists():
            return root
        root.mkdir(parents=True, exist_ok=True)
        with (root / "lock").open("w") as lock:
            # The processes of a host wait for the first of them; without locks each of them copies.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / place).exists():
                stage = Path(tempfile.mkdtemp(prefix=".copy-", dir=root))
                try:
                    _copy(version, stage / place)
                    (root / place).parent.mkdir(parents=True, exist_ok=True)
                    # Another process may have been faster.
                    with contextlib.suppress(OSError):
                        (stage / place).rename(root / place)
                finally:
                    shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"{version} cannot be copied to {root}: {error.strerror}; set XDG_CACHE_HOME to a folder with room"
        ) from None
    return root


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder, the one last by which prepared data is known to be whole."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == "dataset_info.json"):
        with path.open("rb") as original, (target / path.name).open("wb") as copy:
            shutil.copyfileobj(original, copy, 2**24)


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seal_jax"


def find_builder(name: str, data_dir: str | os.PathLike | None) -> Any:
    """Return the TFDS builder of ``name``, whether prepared or not; raise for an unknown one."""
    import tensorflow_datasets as tfds

    record = builder_record(name)
    if record:
        # Importing one of them registers them all with TFDS.
        from seal_jax.data.builders import image_folder

        if record.builder == "image_folder":
            image_folder.check_name(name)
    # "" would be this folder.
    kwargs = {"data_dir": os.fspath(files.as_path(data_dir))} if data_dir else {}
    try:
        return tfds.builder(name, **kwargs)
    except tfds.core.DatasetNotFoundError as error:
        known = {*tfds.list_builders(with_community_datasets=False)}
        known |= {info.builder for info in RECORDS if info.builder}
        raise UsageError(
            f"data.name={name!r} is not a data set that TFDS knows{nearest(name, known)}"
        ) from error
    # TFDS reports a malformed name, configuration, version or description by many types.
    except Exception as error:
        raise UsageError(
            f"data.name={name!r} in data_dir={data_dir}: {first_line(error)}: mend the "
            "name or the folder, or prepare the data in another"
        ) from error


def prepare_command(name: str, data_dir: str | os.PathLike) -> str:
    """Return the shell command that prepares a data set."""
    manual = " --manual-dir=FOLDER" if original_files(name) else ""
    return (
        f"python -m seal_jax prepare --dataset={shlex.quote(name)}{manual} "
        f"--data-dir={shlex.quote(os.fspath(data_dir))}"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that has text, else its type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _elsewhere_hint(name: str, root: str | os.PathLike) -> str:
    """Return how to bring an ordinary TFDS data set to a machine without network."""
    return (
        "a machine with network and TensorFlow prepares it by "
        f"`tfds build {shlex.quote(name)} --file_format=array_record --data_dir=DIR`; copy DIR to "
        f"{root}, or point TFDS_DATA_DIR at the copy"
    )


def _is_prepared(builder: Any) -> bool:
    """Return whether this builder's version has its folder; raise where that is incomplete."""
    # An etils path: prepared data may be in a bucket.
    folder = builder.data_path
    if folder.exists() and not (folder / "dataset_info.json").exists():
        raise UsageError(f"{folder} lacks dataset_info.json: delete it and prepare it again")
    return folder.exists()


def _require_array_record(name: str, builder: Any) -> None:
    """Raise unless prepared data can be read without TensorFlow."""
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise UsageError(
            f"{builder.data_dir} is prepared as {', '.join(sorted(formats))}, which needs "
            "TensorFlow: prepare array_record in another folder: "
            f"{prepare_command(name, 'DIR')}"
        )


def _check_same(builder: Any, manual_dir: Path) -> None:
    """Raise unless the prepared data is that of ``manual_dir``, as far as counting tells."""
    import tensorflow_datasets as tfds

    # TFDS opens prepared data by a generic read-only builder, which has no scan.
    listing = tfds.builder_cls(builder.name).scan(manual_dir)
    counts = {split: part.num_examples for split, part in builder.info.splits.items()}
    if builder.info.features["label"].names != list(listing.classes):
        differing = "other classes"
    elif counts != listing.counts:
        differing = f"other images ({counts}, not {listing.counts})"
    else:
        return
    raise UsageError(
        f"{builder.data_dir} holds {differing} than manual_dir={manual_dir}: give another --data-dir"
    )


def _is_writable(folder: Path) -> bool:
    """Return whether ``folder``, or the nearest folder above it that exists, can be written."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    # The mode says that a shared folder is meant to be read only, also to root.
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _prepare_beside(name: str, builder: Any, manual_dir: str | None, progress: bool) -> None:
    """Prepare next to the destination, then rename into place: no reader sees half a data set."""
    root = Path(builder.data_dir_root)
    stage = Path(tempfile.mkdtemp(prefix=f".{builder.name}-", dir=root))
    try:
        staged = find_builder(name, stage)
        _generate(staged, manual_dir, progress)
        destination = Path(builder.data_dir)
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            Path(staged.data_dir).rename(destination)
        except OSError:  # another process may have been faster
            if not _is_prepared(builder):
                raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _generate(builder: Any, manual_dir: str | None, progress: bool) -> None:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    if not progress:
        tfds.disable_progress_bar()
    # TFDS reports on standard output, which belongs to the caller's own results.
    report: TextIO = sys.stderr if progress else io.StringIO()
    try:
        with contextlib.redirect_stdout(report):
            builder.download_and_prepare(download_config=config, file_format="array_record")
        # While the files are known to be right: `prepare --verify` compares them later.
        shards.write_checksums(Path(builder.data_dir))
    finally:
        tfds.enable_progress_bar()
