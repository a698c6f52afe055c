"""The table of slots says what is there: roles, folders, defaults, keys of a run, options of the command."""

from __future__ import annotations

import importlib.util

import pytest
import typer.main

import kfacore.roles
from kfac_cli.main import app
from kfacore.lab.config.run import RunConfig
from kfacore.registry import get_registry
from kfacore.schema.table import PART_SLOTS, RUN_SLOTS, SLOT_DEFAULTS, SLOTS, flag_of


@pytest.mark.parametrize("slot", SLOTS.values(), ids=SLOTS)
def test_what_a_record_names_is_there(slot) -> None:
    assert slot.name in SLOTS
    assert getattr(kfacore.roles, slot.role).__name__ == slot.role
    assert importlib.util.find_spec(f"kfac_plugins.{slot.folder}") is not None
    if slot.default is not None:
        assert get_registry().find(slot.name, slot.default).slot == slot.name


def test_slots_of_a_run_are_keys_of_its_configuration() -> None:
    assert [key for key in RunConfig.model_fields if key in SLOTS] == list(RUN_SLOTS)
    assert {slot for slot in RUN_SLOTS if RunConfig.model_fields[slot].default is None} == set(PART_SLOTS)
    assert set(RUN_SLOTS) - set(SLOT_DEFAULTS) == {"likelihood"}  # the problem's


def test_flags_are_options_of_the_command() -> None:
    options = {
        option for parameter in typer.main.get_command(app).commands["train"].params for option in parameter.opts
    }
    assert {slot for slot in SLOTS if f"--{slot}" in options} == {slot.name for slot in SLOTS.values() if slot.flag}
    assert flag_of("approx", "mine") == "--approx mine"
    assert flag_of("sink") == "--set sink=NAME"
