import runpy
from pathlib import Path

from enginesmith.compiler.console.groups import show_groups
from enginesmith.compiler.dimensions.dump import dump

build = runpy.run_path(str(Path(__file__).with_name("graphs.py")))["build"]
TEXT = """g (float[n,3,4,4] x, float[8,3,1,1] w1, float[8] b1, float[6,8,1,1] w2, float[2,8,1,1] w3, float[5,8,1,1] w4)
    => (float[n,5,4,4] y) {
    a = Conv(x, w1, b1)  c = Conv(a, w2)  d = Conv(a, w3)  e = Concat<axis=1>(c, d)  f = Relu(e)  y = Conv(f, w4) }"""


def test_a_group_tells_what_makes_reads_and_follows_it():
    first, second, third, _ = dump(build(TEXT))
    assert first["size"] == 8
    assert [f"{place['tensor']}:{place['axis']}" for place in first["made_by"]] == ["w1:0"]
    assert [f"{place['tensor']}:{place['axis']}" for place in first["read_by"]] == ["w2:1", "w3:1"]
    assert [f"{place['tensor']}:{place['axis']}" for place in first["followed_by"]] == ["b1:0"]
    assert first["carried_by"] == ["a:1"]
    assert (first["may_shrink"], first["why_not_shrink"]) == (True, "")
    assert [group["read_by"][0]["positions"] for group in (second, third)] == ["0:6", "6:8"]


def test_a_group_that_is_held_tells_why():
    last = dump(build(TEXT))[-1]
    assert not last["may_grow"]
    assert last["why_not_grow"] == "it is an output of the model (y)"


def test_axes_that_no_weight_makes_are_shown_where_asked_for():
    everything = dump(build(TEXT), everything=True)
    assert len(everything) > len(dump(build(TEXT)))
    batch = next(group for group in everything if "x:0" in group["carried_by"])
    assert (batch["size"], batch["why_not_shrink"]) == (None, "no constant weight makes it")


def test_the_gates_of_a_cell_are_told_as_a_layout():
    text = """g (float[t,n,3] x, float[1,24,3] w1, float[1,24,6] w2, float[6,5] w3) => (float[t,n,5] y)
        <int64[1] one = {1}> {
        a = LSTM<hidden_size=6>(x, w1, w2)  b = Squeeze(a, one)  y = MatMul(b, w3) }"""
    (hidden, _) = dump(build(text))
    assert hidden["made_by"][0]["positions"] == "4 x 6"


def test_people_read_groups_and_a_summary(capsys):
    show_groups(dump(build(TEXT), everything=True))
    out = capsys.readouterr().out
    assert "read by     w4:1 [0:6]  (" in out
    assert "carried by  c:1 and 2 more" in out
    assert "may grow    no: it is an output of the model (y)" in out
    assert "3  may shrink: yes" in out
    assert "no: no constant weight makes it" in out
    assert "  dynamic\n" in out


def test_long_lists_are_cut(capsys):
    readers = "\n".join(f"c{i} = Conv(a, w{i})" for i in range(2, 10))
    weights = ", ".join(f"float[2,8,1,1] w{i}" for i in range(2, 10))
    sums = "\n".join(f"s{i} = Add({'s' if i > 3 else 'c'}{i - 1}, c{i})" for i in range(3, 10))
    show_groups(
        dump(
            build(f"""g (float[n,3,4,4] x, float[8,3,1,1] w1, {weights}) => (float[n,2,4,4] y) {{
        a = Conv(x, w1) {readers} {sums} y = Relu(s9) }}""")
        )
    )
    assert "read by     and 3 more" in capsys.readouterr().out
