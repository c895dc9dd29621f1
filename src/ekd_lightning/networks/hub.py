"""Students by name: a file, a student of the package, or a repository of the Hugging Face hub; and uploads."""

from __future__ import annotations

import re
from pathlib import Path

from ekd_lightning.errors import UserError, one_line, require, unknown_name
from ekd_lightning.files import DamagedFileError, read_json
from ekd_lightning.networks.deploy import SUFFIXES
from ekd_lightning.networks.deployed import DeployedModel, load_deployed

STUDENTS = Path(__file__).parents[1] / "students"
"""Folder of the package's own students: NAME.safetensors, and its model card NAME.md."""
HUB_FILE = "student.safetensors"
"""The only file that is fetched from a student's repository on the hub."""
_FILE = re.compile(rf"student[\w.]*({'|'.join(map(re.escape, SUFFIXES.values()))})", re.ASCII)
_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def load(name: str | Path, device: str = "cpu", *, revision: str | None = None) -> DeployedModel:
    """Loads an exported student for inference; no code of the file is executed.

    Args:
        name: A file that `ekd-export` or `save` wrote, the name of a student in the package (`resnet8-ekd-cifar10`), or
            USER/REPO on the Hugging Face hub, whose `student.safetensors` is read.
        device: Device of the model.
        revision: Branch, tag or commit of the repository.

    Returns:
        The model: `model(images)` gives logits [B, C] for images [B, 3, H, W] in [0, 1].

    Raises:
        UserError: If there is no such student, the hub cannot be reached, or a package is missing.
    """
    return load_deployed(find_student(name, revision), device)


def find_student(name: str | Path, revision: str | None = None) -> Path:
    """Finds the file that `load` reads; a name may also be that of a folder with one student.

    Names of existing files, of folders with a student, and names with the suffix of an exported student are local.

    Raises:
        UserError: For any other name, if the hub cannot be reached, or for a `revision` without a repository.
    """
    own = {path.stem: path for path in STUDENTS.glob("*.safetensors")}
    if str(name) not in own and Path(name).is_dir():
        name = _only_student(Path(name)) or name
    is_file = isinstance(name, Path) or Path(name).suffix in SUFFIXES.values() or Path(name).is_file()
    if isinstance(name, str) and not is_file and name not in own:
        if _REPOSITORY.fullmatch(name):
            return fetch(name, HUB_FILE, revision)
        if "/" not in name:
            raise UserError(f"{unknown_name('student', name, own)}; it is neither a file nor USER/REPO on the hub")
    if revision is not None:
        raise UserError(f"revision={revision!r}: {name} is not a repository on the hub; leave out revision")
    return Path(name) if is_file else own.get(str(name), Path(name))


def _only_student(folder: Path) -> Path | None:
    held = sorted(path for suffix in SUFFIXES.values() for path in folder.glob(f"*{suffix}"))
    if len(held) > 1:
        raise UserError(f"{folder}: a folder of several students; name one: {', '.join(map(str, held))}")
    return held[0] if held else None


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """Fetches one file of the repository USER/REPO on the hub, or finds it in the hub's cache.

    A revision is a branch, tag or commit; None stands for the main branch.

    Raises:
        UserError: If huggingface_hub is not installed, or the hub, the repository or the file cannot be reached.
    """
    require("hub", "huggingface_hub")
    import huggingface_hub  # noqa: PLC0415 (optional)

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # no network, no such repository, no such file, no permission
        raise UserError(f"hub repository {repository!r}: {file} cannot be fetched ({one_line(error)})") from None


def check_repository(repository: str) -> None:
    """Refuses an upload to a name that is not USER/REPO, or without huggingface_hub, by a `UserError`."""
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository!r}: not the name of a repository on the hub; give USER/REPO")
    require("hub", "huggingface_hub")


def push(folder: str | Path, repository: str, *, private: bool = True) -> str:
    """Uploads an exported student with its model card, for `ekd_lightning.load("USER/REPO")`.

    Files of an earlier student in the repository are deleted, so that it holds a single student.

    Args:
        folder: A folder written by `ekd-export`; `README.md`, `export.json` and the files listed there are uploaded.
        repository: USER/REPO, created if it does not exist. The token comes from `hf auth login` or `HF_TOKEN`.
        private: Whether a new repository is private.

    Returns:
        The URL of the commit.

    Raises:
        UserError: If huggingface_hub is not installed, `repository` is not USER/REPO, files of the export are missing
            or unreadable, or the upload fails.
    """
    check_repository(repository)
    import huggingface_hub  # noqa: PLC0415 (optional)

    folder = Path(folder)
    files = ["export.json", "README.md", *_listed(folder)]
    missing = [name for name in dict.fromkeys((*files, HUB_FILE)) if name not in files or not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: lacks {' and '.join(missing)} (ekd-export RUN -o {folder} writes them)")
    try:
        huggingface_hub.ModelCard.load(folder / "README.md")
    except Exception as error:  # errors of YAML and of the hub
        raise UserError(f"{folder / 'README.md'}: the hub cannot read its header ({one_line(error)})") from None
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        old = [f"student*{suffix}" for suffix in SUFFIXES.values()]  # the hub keeps files that are uploaded again
        commit = api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files, delete_patterns=old)
        return str(commit)
    except Exception as error:  # errors of the hub and of the network
        raise UserError(f"hub repository {repository!r}: nothing was uploaded ({one_line(error)})") from None


def _listed(folder: Path) -> list[str]:
    """Returns the names of the student's files that a folder's export.json lists."""
    path = folder / "export.json"
    if not path.is_file():
        return [HUB_FILE]
    try:
        listed = read_json(path).get("files")
    except DamagedFileError:
        listed = None
    if not isinstance(listed, dict) or not all(map(_FILE.fullmatch, listed)):
        raise UserError(f"{path}: damaged, or not written by ekd-export; export the student again")
    return list(listed)
