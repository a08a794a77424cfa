"""Graphs of a toy bundle whose halves mix what they are of: every token of a frame, and every frame of a position."""

SPATIAL_BODY = """
    scaled = Mul (x, slope)
    two = Constant <value_ints=[2]> ()
    over = ReduceMean <keepdims=1> (x, two)
    one = Constant <value_ints=[1]> ()
    both = Concat <axis=1> (spatial_cos, spatial_sin)
    space = ReduceSum <keepdims=1> (both, one)
    weighed = Mul (x, space)
    most = ReduceMax <keepdims=1> (weighed, two)
    mean = ReduceMean <keepdims=1> (modulation, one)
    wide = Unsqueeze (mean, one)
    tenth = Constant <value_float=0.1> ()
    gate = Mul (wide, tenth)
    a = Add (scaled, gate)
    little = Mul (over, tenth)
    b = Add (a, little)
    c = Mul (most, tenth)
    {out} = Add (b, c)
"""
MIXED_BODY = """
    mone = Constant <value_ints=[1]> ()
    along = ReduceMean <keepdims=1> ({x}, mone)
    mtenth = Constant <value_float=0.1> ()
    some = Mul (along, mtenth)
    weight = Exp (text_mask)
    keys = MatMul (weight, text_k)
    values = MatMul (weight, text_v)
    half = Constant <value_float=0.5> ()
    halved = Mul (values, half)
    text = Add (keys, halved)
    all = Concat <axis=1> (temporal_cos, temporal_sin)
    frame = ReduceSum <keepdims=1> (all, mone)
    time = Unsqueeze (frame, mone)
    moving = Mul (time, {x})
    last = ReduceMax <keepdims=1> (moving, mone)
    d = Add ({x}, some)
    e = Add (d, text)
    f = Mul (last, mtenth)
    x_out = Add (e, f)
"""
STATE = "float[M,T,S,4] x, float[M,6,4] modulation"
SPACE = "float[S,2] spatial_cos, float[S,2] spatial_sin"
TEXT = "float[M,1,L,4] text_k, float[M,1,L,4] text_v, float[M,1,1,L] text_mask"
TIME = "float[T,2] temporal_cos, float[T,2] temporal_sin"
SLOPE = "    slope = Constant <value_float=0.5> ()"
SPATIAL = f"g ({STATE}, {SPACE}) => (float[M,T,S,4] x_out)\n{{\n{SLOPE}{SPATIAL_BODY.format(out='x_out')}}}"
MIXED = f"""g ({STATE}, {TEXT}, {TIME}) => (float[M,T,S,4] x_out)
{{{MIXED_BODY.format(x="x")}    unused = Identity (modulation)
}}"""
BLOCK = f"""g ({STATE}, {TEXT}, {SPACE}, {TIME}) => (float[M,T,S,4] x_out)
{{\n{SLOPE}{SPATIAL_BODY.format(out="y")}{MIXED_BODY.format(x="y")}}}"""


def mixing_graphs() -> dict[str, tuple[str, dict]]:
    """Blocks and their halves, by name."""
    graphs = {}
    for index in range(2):
        pair = {f"block_{index:02d}": BLOCK, f"spatial_{index:02d}": SPATIAL, f"mixed_{index:02d}": MIXED}
        graphs |= {name: (text, {}) for name, text in pair.items()}
    return graphs
