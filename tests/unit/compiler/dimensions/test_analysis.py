import runpy
from pathlib import Path

import pytest

helpers = runpy.run_path(str(Path(__file__).with_name("graphs.py")))
analysed, between, find = helpers["analysed"], helpers["between"], helpers["find"]


def test_all_outputs_of_a_normalization_are_followed():
    text = between(
        "z1, m, v, s = com.microsoft.SkipLayerNormalization(h, t, b1)  z = Add(z1, s)",
        ", float[n,4,6] t, float[6] b1",
        header='<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>',
        constants="<float[n,4,6] z1, float[n,4,6] s, float[n,4,6] z>",
    )
    dimensions = analysed(text)
    assert find(dimensions, "s", 2) is find(dimensions, "w1", 1)


def test_other_axes_of_a_slice_that_is_computed_are_followed():
    text = """g (float[n,s,8] x, float[8,6] w1, float[1,64,6] w2, float[6,5] w3, int64[1] a) => (float[n,s,5] y)
        <int64[1] low = {0}, int64[1] one = {1}, float[1,s,6] p> {
        h = MatMul(x, w1)  p = Slice(w2, low, a, one)  z = Add(h, p)  y = MatMul(z, w3) }"""
    dimensions = analysed(text)
    assert find(dimensions, "w2", 2) is find(dimensions, "w1", 1)
    assert find(dimensions, "w1", 1).why_not("shrink") == ""
    assert find(dimensions, "w2", 1).holds[0].reason == "where it cuts is computed"


def test_the_reason_names_the_node():
    group = find(analysed(between("z = Softmax<axis=-1>(h)")), "w1", 1)
    assert group.why_not("shrink").endswith(" (z)")


def test_outputs_may_grow_where_what_is_new_is_cut_off():
    group = find(analysed(between("z = Relu(h)")), "w2", 1)
    assert group.why_not("grow") == "it is an output of the model (y)"
    assert group.why_not("grow", outputs_too=True) == ""


def test_inputs_keep_their_sizes():
    group = find(analysed(between("z = Relu(h)")), "w1", 0)
    assert group.why_not("shrink") == "no constant weight makes it"
    assert [hold.reason for hold in group.holds] == ["it is an input of the model"]


@pytest.mark.parametrize("operator", ["Relu", "Sigmoid", "Erf", "Clip", "Cast<to=1>", "Identity", "Sqrt"])
def test_unary_operators_pass_axes_on(operator):
    assert find(analysed(between(f"z = {operator}(h)")), "w1", 1).why_not("grow") == ""


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "PRelu"])
def test_vectors_follow(operator):
    dimensions = analysed(between(f"z = {operator}(h, b1)", ", float[6] b1"))
    group = find(dimensions, "w1", 1)
    assert [member.value.name for member in group.of("follows")] == ["b1"]
    assert group.why_not("grow") == ""


def test_a_weight_that_two_layers_share_ties_them():
    text = """g (float[n,6] x, float[6,6] w1, float[6,5] w2) => (float[n,5] y) {
        a = MatMul(x, w1)  r = Relu(a)  b = MatMul(r, w1)  y = MatMul(b, w2) }"""
    dimensions = analysed(text)
    assert find(dimensions, "w1", 0) is find(dimensions, "w1", 1)
    assert find(dimensions, "w1", 1).holds[0].reason == "it is an input of the model"


def test_a_vector_that_two_layers_share_does_not():
    text = """g (float[n,4] x, float[4,6] w1, float[6] b1, float[6,6] w2, float[6,5] w3) => (float[n,5] y) {
        a = MatMul(x, w1)  c = Add(a, b1)  d = MatMul(c, w2)  e = Add(d, b1)  y = MatMul(e, w3) }"""
    dimensions = analysed(text)
    first, second = find(dimensions, "w1", 1), find(dimensions, "w2", 1)
    assert first is not second
    assert [m.value.name for m in (*first.of("follows"), *second.of("follows"))] == ["b1", "b1"]


def test_tied_embeddings_are_one_group_that_the_output_holds():
    text = """g (int64[n,s] i, float[9,6] w1) => (float[n,s,9] y) {
        a = Gather(w1, i)  t = Transpose<perm=[1,0]>(w1)  y = MatMul(a, t) }"""
    dimensions = analysed(text)
    width, words = find(dimensions, "w1", 1), find(dimensions, "w1", 0)
    assert width.why_not("shrink") == ""
    assert {hold.reason for hold in words.holds} == {"positions are looked up in it", "it is an output of the model"}


def test_heads_and_their_size_are_groups_of_their_own():
    dimensions = analysed(helpers["GRAPHS"]["fused attention"])
    value = next(v for v in helpers["values"](dimensions.graph) if v.name == "w1")
    groups = dimensions.at(value, 1)
    assert sorted(group.size for group in groups) == [2, 6]
    heads = next(group for group in groups if group.size == 2)
    assert [group.parents for group in groups if group is not heads] == [{heads.dim}]


def test_one_bias_for_each_head_follows_the_heads():
    dimensions = analysed(helpers["GRAPHS"]["head bias"])
    assert find(dimensions, "w2", 1).size == 2
    assert [m.value.name for m in find(dimensions, "w2", 1).of("follows")] == ["w2"]


def test_axes_of_unknown_length_are_left_alone():
    text = """g (float[a,b] x, float[c,6] w, float[6,5] w2) => (float[a,5] y) {
        h = MatMul(x, w)  r = Relu(h)  y = MatMul(r, w2) }"""
    group = find(analysed(text), "w2", 0)
    assert group.why_not("shrink") == "no constant weight makes it"


def test_axes_without_a_name_get_lengths_too():
    text = """g (float[?,4,8] x, float[8,6] w1, float[6,5] w2) => (float[?,5] y) <int64[2] rows = {-1, 6}> {
        h = MatMul(x, w1)  r = Reshape(h, rows)  y = MatMul(r, w2) }"""
    assert find(analysed(text), "w1", 1).why_not("grow") == ""


def test_lengths_that_cannot_be_leave_what_is_known():
    text = """g (float[n,3,h,w] x, float[6,3,1,1] w1, float[5,6,1,1] w2) => (float[n,5,a,b] y)
        <float[4] twice = {1.0, 1.0, 2.0, 2.0}> {
        a1 = Conv(x, w1)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a1)  u = Resize(p, , twice)
        c = Add(a1, u)  y = Conv(c, w2) }"""
    assert find(analysed(text), "w1", 0).why_not("grow") == ""


def test_a_quantized_weight_makes_its_channels():
    text = """g (float[n,3,4,4] x, int8[8,3,1,1] w1, float[8] b1, int8[5,8,1,1] w2) => (float[n,5,4,4] y)
        <float s = {0.1}, int8 z = {0}, int8[8] o = {0, 0, 0, 0, 0, 0, 0, 0}> {
        v = Abs(b1)  f = DequantizeLinear<axis=0>(w1, b1, o)  a = Conv(x, f)  q = QuantizeLinear(a, s, z)
        d = DequantizeLinear(q, s, z)  g1 = DequantizeLinear(w2, s, z)  y = Conv(d, g1) }"""
    group = find(analysed(text), "w1", 0)
    assert [member.value.name for member in group.of("writes")] == ["w1"]
    assert [member.value.name for member in group.of("reads")] == ["w2"]
    assert {member.value.name for member in group.of("follows")} == {"b1", "o"}
    assert group.why_not("grow") == ""


def test_a_quantized_weight_whose_zero_points_differ_does_not_grow():
    text = """g (float[n,3,4,4] x, int8[4,3,1,1] w1, float[4] b1, float[5,4,1,1] w2) => (float[n,5,4,4] y)
        <int8[4] o = {0, 1, 0, 0}> {
        f = DequantizeLinear<axis=0>(w1, b1, o)  a = Conv(x, f)  y = Conv(a, w2) }"""
    group = find(analysed(text), "w1", 0)
    assert group.why_not("shrink") == ""
    assert group.why_not("grow").startswith("its zero points differ")


def test_channels_that_are_quantized_in_blocks_keep_their_size():
    text = """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,8] x, int8[8,6] w1, float[4,6] w2, float[6,5] w3) => (float[n,5] y) {
        f = DequantizeLinear<axis=0, block_size=2>(w1, w2)  a = MatMul(x, f)  y = MatMul(a, w3) }"""
    assert find(analysed(text), "w1", 1).why_not("shrink").startswith("it is quantized in blocks")


def test_integer_products():
    text = """g (float[n,8] x, int8[8,6] w1, uint8 zero) => (float[n,6] y) <float s = {0.1}> {
        q, t, o = DynamicQuantizeLinear(x)  a = MatMulInteger(q, w1, o)  c = Cast<to=1>(a)  y = Mul(c, s) }"""
    assert [member.value.name for member in find(analysed(text), "w1", 1).of("writes")] == ["w1"]


def test_channels_of_an_image_are_followed_through_resizing_and_pooling():
    text = """g (float[n,3,4,4] x, float[6,3,1,1] w1, float[5,6,1,1] w2) => (float[n,5,m,k] y)
        <float[4] f = {1.0, 1.0, 2.0, 2.0}> {
        a = Conv(x, w1)  r = Resize(a, , f)  p = AveragePool<kernel_shape=[2,2]>(r)  y = Conv(p, w2) }"""
    dimensions = analysed(text)
    assert find(dimensions, "w1", 0).why_not("grow") == ""
    assert any("a kernel moves over it" in hold.reason for hold in find(dimensions, "a", 2).holds)


def test_attention_shares_heads_between_readers():
    text = """<ir_version: 11, opset_import: ["": 23]>
        g (float[n,5,8] x, float[8,24] w1, float[8,12] w2, float[8,12] w3, float[24,5] w4) => (float[n,5,5] y) {
        q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)
        a = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v)  y = MatMul(a, w4) }"""
    dimensions = analysed(text)
    value = next(v for v in helpers["values"](dimensions.graph) if v.name == "w1")
    reasons = {group.size: group.why_not("shrink") for group in dimensions.at(value, 1)}
    assert reasons.keys() == {2, 6}
    assert reasons[6].startswith("attention divides by its root")
    assert reasons[2] == ""


def test_a_mask_for_each_head_holds_the_heads():
    text = """<ir_version: 11, opset_import: ["": 23]>
        g (float[n,5,8] x, float[8,24] w1, float[8,24] w2, float[8,24] w3, float[24,5] w4, float[1,4,5,5] w5)
        => (float[n,5,5] y) {
        q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)
        a = Attention<q_num_heads=4, kv_num_heads=4, scale=0.4>(q, k, v, w5)  y = MatMul(a, w4) }"""
    dimensions = analysed(text)
    value = next(v for v in helpers["values"](dimensions.graph) if v.name == "w1")
    reasons = {group.size: group.why_not("shrink") for group in dimensions.at(value, 1)}
    assert reasons[4].startswith("it masks attention") or reasons[4].startswith("each head has a mask")
    assert reasons[6] == ""
