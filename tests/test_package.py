"""What the package says of itself: its metadata, its version and how to cite it."""

import re
import shutil
from email import message_from_string
from pathlib import Path

import pytest
import yaml
from setuptools import build_meta

import aadl_hvd

ROOT = Path(__file__).parent.parent
NEEDED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "aadl_hvd")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The metadata of a package built from this tree, not of the one that is installed."""
    folder = tmp_path_factory.mktemp("package")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        made = build_meta.prepare_metadata_for_build_wheel(str(folder))
    return message_from_string((folder / made / "METADATA").read_text())


def test_metadata_describes_the_package(metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert len(metadata.get_all("Project-URL")) >= 2
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_no_extra_asks_pip_to_build_horovod(metadata):
    assert not [r for r in metadata.get_all("Requires-Dist") if r.startswith("horovod")]


def test_the_version_is_the_same_everywhere(metadata):
    version = aadl_hvd.__version__
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert metadata["Version"] == version
    assert next(h for h in headings if h != "Unreleased") == version
    assert citation["version"] == version
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
