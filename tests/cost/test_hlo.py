"""Tests the reading of HLO."""

from peft_jax.cost import read_program

TEXT = """HloModule m, is_scheduled=true

FileNames
1 "a.py"

%inner (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0:T(128)S(1)} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main.1_spmd (x: bf16[4,100], /*index=1*/y: s32[]) -> (bf16[4,100], s32[]) {
  %x = bf16[4,100]{1,0:T(8,128)(2,1)} parameter(0)
  %y = s32[]{:T(128)} parameter(1)
  %c = s8[2,2]{1,0} constant({
    { 1, 2 },
    { 3, 4 }
  })
  %k = f32[8]{0} custom-call(%x, %c), custom_call_target="k", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 5}"
}}, called_computations={%inner}, metadata={op_name="jit(f)/mlp/dot" stack_frame_id=3}
  ROOT %t = (bf16[4,100]{1,0:T(8,128)(2,1)}, /*index=1*/s32[]{:T(128)}) tuple(%x, /*index=1*/%y)
}
"""


def test_instructions_over_several_lines_are_one():
    program = read_program(TEXT)
    assert program.entry == "main.1_spmd"
    main = program.computations[program.entry]
    assert list(main.instructions) == ["x", "y", "c", "k", "t"]
    kernel = main.instructions["k"]
    assert kernel.opcode == "custom-call"
    assert kernel.operands == ("x", "c")
    assert kernel.called() == ["inner"]
    assert kernel.op_name == "jit(f)/mlp/dot"
    assert "block" in kernel.attributes


def test_results_have_their_layouts_padding_and_space():
    program = read_program(TEXT)
    main = program.computations[program.entry]
    assert main.root.operands == ("x", "y")
    array, number = main.root.result
    assert (array.shape, array.size, array.bytes, array.space) == ((4, 100), 400, 8 * 128 * 2, 0)
    assert number.bytes == 4
    assert program.computations["inner"].root.result[0].space == 1


def test_users_and_parameters_are_found():
    main = read_program(TEXT).computations["main.1_spmd"]
    assert [one.name for one in main.users["x"]] == ["k", "t"]
    assert {n: one.name for n, one in main.parameters.items()} == {0: "x", 1: "y"}
