import json
import subprocess
import sys

import networkx as nx
import pytest

from stagecut.tools.partition_viz import main


def record(**changes):
    nodes = [{"id": name, "compute_s": {"cpu": load}} for name, load in (("a", 1.0), ("b", 4.0), ("c", 3.0))]
    edges = [{"source": "a", "target": "b"}, {"source": "b", "target": "c"}]
    graph = {"devices": [{"name": f"cpu:{i}", "kind": "cpu"} for i in range(2)]}
    return {"directed": True, "multigraph": False, "graph": graph, "nodes": nodes, "edges": edges, **changes}


@pytest.fixture
def write(tmp_path):
    def write(data):
        path = tmp_path / "graph.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return write


def solved(capsys, *arguments):
    assert main(["solve", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_names_a_device_for_every_node_and_says_what_is_proven(write, capsys):
    cut = solved(capsys, write(record()))
    assert set(cut["device_of"]) == {"a", "b", "c"}
    assert set(cut["order"]) == {"cpu:0", "cpu:1"}
    assert (cut["max_load"], cut["lower_bound"], cut["optimal"]) == (5.0, 5.0, True)
    assert cut["seconds"] >= 0


def test_max_chunks_lets_a_device_come_twice(write, capsys):
    cut = solved(capsys, write(record()), "--max-chunks", "2", "--time-limit-s", "5")
    assert cut["max_load"] == 4.0
    assert len(cut["order"]) == 3
    assert cut["device_of"]["a"] == cut["device_of"]["c"]


def test_edges_may_be_called_links_and_ids_may_be_numbers(write, capsys):
    graph = nx.path_graph(3, create_using=nx.DiGraph)
    for v in graph:
        graph.nodes[v]["compute_s"] = {"cpu": 2.0}
    graph.graph["devices"] = record()["graph"]["devices"]
    cut = solved(capsys, write(nx.node_link_data(graph, edges="links")))
    assert set(cut["device_of"]) == {"0", "1", "2"}
    assert cut["max_load"] == 4.0


def test_table_shows_stages_and_the_proof(write, capsys):
    assert main(["solve", write(record())]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split()[:3] == ["stage", "device", "nodes"]
    assert "largest device load 5 s (optimal, proven)" in out


def without(key):
    data = record()
    del data[key]
    return data


def node(**changes):
    data = record()
    data["nodes"][1].update(changes)
    return data


def graph(**changes):
    data = record()
    data["graph"].update(changes)
    return data


BAD_FILES = {
    "not JSON": ('{"nodes": [}', "line 1, column 12"),
    "no object": ("[]", "expected an object"),
    "no nodes": (without("nodes"), '"nodes"'),
    "no edges": (without("edges"), '"edges"'),
    "no graph": (without("graph"), '"graph"'),
    "no devices": (graph(devices=[]), "graph.devices"),
    "device without kind": (graph(devices=[{"name": "x"}]), "graph.devices[0]"),
    "unknown field of a device": (graph(devices=[{"name": "x", "kind": "cpu", "speed": 2}]), "speed"),
    "limit that is no number": (graph(devices=[{"name": "x", "kind": "cpu", "memory_bytes": "1"}]), "memory_bytes"),
    "transfer without seconds": (graph(transfers=[{"nodes": ["a", "b"]}]), "graph.transfers[0]"),
    "transfer to nowhere": (graph(transfers=[{"nodes": ["a", "z"], "seconds": 1.0}]), "'z'"),
    "group that is no list": (graph(together=["ab"]), "graph.together[0]"),
    "limit below nothing": (graph(devices=[{"name": "x", "kind": "cpu", "memory_bytes": -1.0}]), "at least 0 or null"),
    "limit that is no finite number": (
        graph(devices=[{"name": "x", "kind": "cpu", "memory_bytes": 10**400}]),
        "at least",
    ),
    "transfers that are no list": (graph(transfers=None), "graph.transfers must be a list"),
    "groups that are no list": (graph(together=1.5), "graph.together must be a list"),
    "node without id": (record(nodes=[{"compute_s": {}}]), "nodes[0]"),
    "the same id twice": (node(id="a"), "nodes[1]"),
    "node without times": (node(compute_s=None), "nodes[1] ('b')"),
    "time that is no number": (node(compute_s={"cpu": "4"}), "nodes[1] ('b')"),
    "negative time": (node(compute_s={"cpu": -4.0}), "'b'"),
    "bytes that are no number": (node(memory_bytes="much"), "memory_bytes"),
    "kinds that are no list": (node(kinds="cpu"), "kinds"),
    "edge to nowhere": (record(edges=[{"source": "a", "target": "z"}]), "edges[0]: the target 'z'"),
    "edge without source": (record(edges=[{"target": "a"}]), "edges[0]"),
    "pin to nowhere": (node(pin="gpu:9"), "gpu:9"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_bad_file_is_refused_in_one_line_that_says_what_and_where(what, write, capsys):
    data, where = BAD_FILES[what]
    path = write(data)
    assert main(["solve", path]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert path in captured.err
    assert where in captured.err


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, "1" * 5_000])
def test_what_no_json_reader_reads_is_refused_in_one_line(text, tmp_path, capsys):
    path = tmp_path / "graph.json"
    path.write_text(text)
    assert main(["solve", str(path)]) == 2
    assert f"{path}: not JSON that can be read" in capsys.readouterr().err


def test_missing_file_is_refused(tmp_path, capsys):
    assert main(["solve", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


@pytest.mark.parametrize("max_chunks", ["1", "2"])
def test_graph_that_fits_nowhere_ends_with_4(max_chunks, write, capsys):
    data = node(memory_bytes=50.0)
    data["graph"]["devices"][0]["memory_bytes"] = data["graph"]["devices"][1]["memory_bytes"] = 10.0
    assert main(["solve", write(data), "--max-chunks", max_chunks]) == 4
    assert "50 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--max-chunks", "0"], ["--time-limit-s", "0"], ["--time-limit-s", "inf"], []])
def test_wrong_arguments_end_with_2(arguments, write):
    assert main(["solve", *([write(record())] if arguments else []), *arguments]) == 2


def test_help_has_examples(capsys):
    assert main(["solve", "--help"]) == 0
    assert "partition-viz solve graph.json --max-chunks 2" in " ".join(capsys.readouterr().out.split())


def test_command_solves_without_importing_torch(write):
    code = (
        "import sys; from stagecut.tools.partition_viz import main; code = main(sys.argv[1:]); "
        "print([name for name in sys.modules if name.split('.')[0] == 'torch'], file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "solve", write(record()), "--json"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.strip() == "[]"
    assert json.loads(run.stdout)["max_load"] == 5.0
