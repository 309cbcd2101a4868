"""Parsing the text of compiled programs."""

import pytest

from disco_jax.plan import hlo

PROGRAM = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} add(%p, %p), backend_config={"estimated_cycles":"1000000"}
}

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  ROOT %turn = (s32[], f32[8]{0}) fusion(%t), calls=%fused, backend_config={"estimated_cycles":"5"}
}

%beside (p.3: u8[2]) -> u8[40] {
  %part = u8[40]{0} all-gather(%p.3), dimensions={0}, frontend_attributes={chain_id="3"}
}

%beside.too (p.4: u8[2]) -> u8[40] {
  %part.1 = u8[40]{0} all-gather(%p.4), dimensions={0}, frontend_attributes={chain_id="3"}
}

%dear (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} fusion(%p.1), calls=%fused, backend_config={"estimated_cycles":"300"}
}

%cheap (p.2: f32[8]) -> f32[8] {
  ROOT %p.2 = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %f = f32[8]{0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"20"}
  %w = (s32[], f32[8]{0}) while(%f), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %choice = f32[8]{0} conditional(%i, %f, %f), branch_computations={%dear, %cheap}
  %r = (f32[8,4]{1,0:T(8,128)}, bf16[16]{0}) all-reduce(%f, %g), replica_groups={{0,1}}
  %gs = ((f32[8]{0}), (f32[16]{0:T(128)}, s8[3]{0})) all-gather-start(%f), dimensions={0}
  %gd = (f32[16]{0}, s8[3]{0}) all-gather-done(%gs)
  %shuffled = u8[100]{0} all-to-all(%x)
  ROOT %out = f32[8]{0} fusion(%choice), calls=%fused, backend_config={"estimated_cycles":"1"}
}
"""  # noqa: E501


def test_cycles_count_loops_by_turns_choices_by_their_mean_and_fusions_once():
    assert hlo.cycles(PROGRAM) == 20 + 7 * 5 + (300 + 0) / 2 + 1


def test_the_dearest_instructions_come_first_with_all_their_turns():
    first, second, third = hlo.most_expensive(PROGRAM, 3)
    assert (first[0], second[0], third[0]) == (150, 35, 20)
    assert first[1] == "%a f32[8]: " and second[1].startswith("%turn (s32[]")
    assert len(hlo.most_expensive(PROGRAM, 100)) == 4 and hlo.most_expensive(PROGRAM, 0) == []


def test_collectives_are_counted_once_with_what_they_make():
    assert hlo.collective_bytes(PROGRAM) == {
        "all-gather": hlo.Collective(2, 16 * 4 + 3 + 40),
        "all-reduce": hlo.Collective(1, 8 * 4 * 4 + 16 * 2),
        "all-to-all": hlo.Collective(1, 100),
    }


def test_a_text_that_is_no_program_is_an_error():
    with pytest.raises(KeyError):
        hlo.cycles(PROGRAM.replace("ENTRY", "lost"))
