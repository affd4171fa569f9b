"""Tables of README and docs are those of the results, and no result lies about unused."""

import json
import re

import pytest

from benchmarks import tables

DOCUMENTS = [tables.ROOT / name for name in tables.DOCUMENTS]
RESULTS = sorted(path for path in tables.RESULTS.rglob("*") if path.is_file())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(path):
    text = path.read_text()
    assert tables.renewed(text) == text, "python -m benchmarks.tables writes them anew"
    assert text.count("<!-- table:") == text.count("<!-- end -->") == len(tables.names_in(text))


def test_predictions_in_the_readme_are_those_of_the_results():
    found = json.loads((tables.RESULTS / "simulate.json").read_text())["methods_table"]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    shares = {
        row["method"]: row["% of a float32 step"]
        for row in rows
        if row["GPU"].startswith("V100") and row["history of"] == "all ranks"
    }
    methods = "residual-norm, p = q = 5", "residual-norm", "subspace", "subspace, overlap=True"
    readme = (tables.ROOT / "README.md").read_text()
    said = re.search(r"1,536 V100 GPUs with ResNet50, predicted \|(.*)", readme)[1]
    assert re.findall(r"([\d.]+) %", said) == [shares[method] for method in methods]


def test_another_number_is_seen():
    text = "x\n<!-- table: memory -->\n\n| 1.09 |\n\n<!-- end -->\ny\n"
    found = tables.renewed(text)
    assert found != text and "| rows " in found and "1.09" not in found
    assert found.startswith("x\n") and found.endswith("y\n")
    assert tables.renewed(found) == found
    with pytest.raises(KeyError):
        tables.renewed("<!-- table: nothing -->\n<!-- end -->\n")


def test_every_table_is_shown():
    shown = [name for path in DOCUMENTS for name in tables.names_in(path.read_text())]
    assert set(shown) == set(tables.TABLES)


def test_every_result_is_shown_or_read():
    """A plot in a document, a file that a table is made from, or what a shown folder is about."""
    texts = [path.read_text() for path in (tables.ROOT / "docs").glob("*.md")]
    texts.append((tables.ROOT / "README.md").read_text())
    linked = {
        name for text in texts for name in re.findall(r"benchmarks/results/([\w./-]+\.\w+)", text)
    }
    source = (tables.ROOT / "benchmarks" / "tables.py").read_text()
    read = set(re.findall(r'(?:_results|convergence)\("([\w/]+)"\)', source))
    for path in RESULTS:
        name = path.relative_to(tables.RESULTS).as_posix()
        folder, stem = name.split("/")[0], name.removesuffix(".json")
        used = name in linked or stem in read or folder in read or name.startswith(tables.H100)
        assert used, f"{name}: nothing shows it"
    for name in linked:
        assert (tables.RESULTS / name).is_file(), f"{name}: linked, but not there"


def test_convergence_is_read_by_problem():
    found = tables.convergence("convergence")
    assert set(tables.PROBLEMS.values()) == set(found)
    assert found["quadratic"]["default"]["seeds"] == "10"
