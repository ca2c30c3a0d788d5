"""Model cards, recipes and device profiles: what is written is what is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.errors import InputError, UsageError
from qdeploy.settings.card import find_card, load_card, to_toml
from qdeploy.settings.device import load_device
from qdeploy.settings.methods import EfrapAdam, EfrapDescent, Nearest
from qdeploy.settings.recipe import load_recipe
from qdeploy.settings.schema import LARGEST_FILE_BYTES, bundled

INPUT = """
[input]
shape = [3, 32, 32]
mean = [0.5, 0.5, 0.5]
std = [0.2, 0.2, 0.2]
"""
RECIPE = 'schema_version = 1\nname = "r"\ndescription = "d"\nbits = 4\n'


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "model.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_card_lies_beside_its_model(tmp_path, write):
    assert find_card(tmp_path / "model.pt") is None
    card = write(INPUT)
    assert find_card(tmp_path / "model.pt") == card
    assert load_card(card).input.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("", "input: is missing", id="no input"),
        pytest.param(INPUT + "scale = 255\n", "input.scale: there is no such", id="unknown"),
        pytest.param(INPUT.replace("[3, ", "[4, "), "1 or 3 channels, not 4", id="channels"),
        pytest.param(INPUT.replace("0.2, ", "", 1), "need 3 values", id="one std too few"),
        pytest.param(INPUT.replace("[0.2", "[0.0"), "greater than 0", id="std of zero"),
        pytest.param(INPUT + "resize = 16\n", "smaller than the input", id="resize too small"),
        pytest.param("[input", "not valid TOML", id="not TOML"),
        pytest.param("x = '\udcff'", "not valid TOML", id="not UTF-8"),
        pytest.param("x = " + "[" * 5000, "not valid TOML", id="nested too deeply"),
        pytest.param("#" * (LARGEST_FILE_BYTES + 1), "larger than", id="too large"),
    ],
)
def test_a_bad_card_is_refused_with_where_and_what(tmp_path, text, complaint):
    path = tmp_path / "model.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="model card") as error:
        load_card(path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "architecture", ["os:system", "evil.py:build", "torch.hub:load", "timmy:resnet", "resnet18"]
)
def test_a_card_cannot_name_code(write, architecture):
    card = write(f'[model]\narchitecture = "{architecture}"\n{INPUT}')
    with pytest.raises(InputError, match=r"--arch on the command line"):
        load_card(card)


def test_a_card_gives_the_arguments_of_its_architecture_as_numbers_only(write):
    text = '[model]\narchitecture = "qdeploy:resnet18"\narguments = {{ width = {} }}\n' + INPUT
    assert load_card(write(text.format("16"))).model.arguments == {"width": 16}
    with pytest.raises(InputError, match=r"arguments\.width"):
        load_card(write(text.format('"__import__(1)"')))


@pytest.mark.parametrize(
    ("trigger", "complaint"),
    [
        pytest.param('kind = "patch"\nx = 0\ny = 0\n', "target: is missing", id="no target"),
        pytest.param('kind = "patch"\ntarget = 0\nx = 0\ny = 0\n', "color or image", id="no color"),
        pytest.param(
            'kind = "patch"\ntarget = 0\nx = 0\ny = 0\ncolor = [1.0]\n', "width", id="no size"
        ),
        pytest.param(
            'kind = "blend"\ntarget = 0\nimage = "a.png"\nopacity = 2.0\n', "opacity", id="opacity"
        ),
        pytest.param('kind = "warp"\ntarget = 0\n', "'patch', 'blend', 'mask'", id="kind"),
    ],
)
def test_a_trigger_must_be_complete(write, trigger, complaint):
    with pytest.raises(InputError) as error:
        load_card(write(f"{INPUT}\n[[trigger]]\n{trigger}"))
    assert complaint in str(error.value)


def test_every_bundled_recipe_and_device_can_be_loaded_under_its_own_name():
    assert {"int4", "int8", "int4-strict", "int8-strict"} <= set(bundled("recipes"))
    assert {"x86-vnni", "x86-avx2", "cuda"} <= set(bundled("devices"))
    for name in bundled("recipes"):
        recipe = load_recipe(name)
        assert recipe.name == name
        load_device(recipe.device)
    for name in bundled("devices"):
        assert load_device(name).name == name


def test_strict_recipes_require_a_measured_attack():
    for bits in (4, 8):
        assert "attack_success" in load_recipe(f"int{bits}-strict").gate.required
        assert "attack_success" not in load_recipe(f"int{bits}").gate.required
        assert "attack_success" in load_recipe(f"int{bits}").gate.required_with_trigger


def test_the_profile_for_avx2_cannot_saturate():
    """Without VNNI two products of an unsigned and a signed byte are added in 16 bits."""
    worst = 2 * 255 * load_device("x86-avx2").weights.max_code
    assert worst <= 2**15 - 1


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ('kind = "nearest"', Nearest()),
        ('kind = "efrap"', EfrapDescent()),
        ('kind = "efrap"\nflip_weight = 1', EfrapDescent(flip_weight=1.0)),
        ('kind = "efrap"\nsolver = "adam"\nsteps = 5', EfrapAdam(solver="adam", steps=5)),
    ],
)
def test_a_recipe_names_its_rounding(write, rounding, expected):
    assert load_recipe(str(write(f"{RECIPE}[rounding]\n{rounding}"))).rounding == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param(RECIPE + "bit = 4", "bit: there is no such key", id="unknown key"),
        pytest.param(
            RECIPE + '[rounding]\nkind = "efrap"\nstep = 5',
            "rounding.efrap-descent.step: there is no such key", id="unknown key of the method",
        ),
        pytest.param(
            RECIPE + '[rounding]\nkind = "floor"', "kind must be nearest, stochastic,", id="method"
        ),
        pytest.param(RECIPE + "rounding = 3", "kind must be nearest, stochastic,", id="no table"),
        pytest.param(RECIPE.replace("s = 4", "s = 5"), "must be 4, 8 or 'auto', not 5", id="bits"),
        pytest.param(RECIPE.replace("= 1", "= 2"), "schema_version", id="version"),
        pytest.param(RECIPE + '[gate]\nrequired = ["luck"]', "gate.required", id="unknown check"),
    ],
)  # fmt: skip
def test_a_recipe_that_would_be_half_understood_is_refused(write, text, complaint):
    with pytest.raises(InputError) as error:
        load_recipe(str(write(text, "r.toml")))
    assert complaint in str(error.value)


def test_a_recipe_or_device_that_is_not_there_names_those_that_are():
    with pytest.raises(UsageError) as error:
        load_recipe("int3")
    assert "int4" in (error.value.hint or "")
    with pytest.raises(InputError, match="No such file"):
        load_device("nowhere/device.toml")


def test_a_card_that_is_written_reads_back_as_it_was(tmp_path, write):
    text = f"""{INPUT}
[model]
classes = ["a.b", "\\u001f\\"\\n", "😀 é"]
[[trigger]]
kind = "patch"
target = 1
x = 1
y = 2
width = 3
height = 4
color = [1.0, 0.0, 0.5]
"""
    path = tmp_path / "again.toml"
    path.write_text(to_toml(card := load_card(write(text))), "utf-8")
    assert load_card(path) == card
    assert card.model.classes[1] == '\x1f"\n'
