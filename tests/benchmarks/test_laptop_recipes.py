"""The committed result of the laptop recipes, and what the page says of it."""

import json
from pathlib import Path

import pytest

from benchmarks.laptop_recipes import RECIPES, page

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result():
    return json.loads((ROOT / "benchmarks" / "results" / "laptop_recipes.json").read_text())


def test_the_page_has_the_table_of_the_result(result):
    assert page(result) in (ROOT / "docs" / "training.md").read_text()


def test_each_recipe_ran_within_its_time_in_three_seeds(result):
    runs = {(c["recipe"], c["seed"]): c for c in result["curves"]}
    assert set(runs) == {(recipe, seed) for recipe in RECIPES for seed in (0, 1, 2)}
    assert all(c["cpu_minutes"] < 15 and len(c["step"]) == len(c["loss"]) > 10 for c in runs.values())
    assert {r["part"] for r in result["rows"]} == {"novel"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_seed_beats_random_init_by_ten_points(result, recipe):
    five = {(r["encoder"], r["seed"]): r["accuracy"] for r in result["rows"] if r["shot"] == 5}
    for seed in (0, 1, 2):
        best = max(value for (encoder, s), value in five.items() if s == seed and encoder.startswith("random"))
        assert five[recipe, seed] - best >= 0.10, f"seed {seed}"
