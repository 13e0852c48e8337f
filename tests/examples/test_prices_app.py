"""The market's functions, called as plain functions and as the subscription service runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from examples.prices.app import COMPANIES, companies, first_prices, may, next_prices, prices

from trunkline.app import Operation
from trunkline.app.testing import RecordingContext, run_subscription

EXAMPLES = Path(__file__).parents[2] / "examples"


async def test_the_market_is_a_walk_that_goes_on_where_it_was() -> None:
    whole = await run_subscription(prices, "market.main", count=3)
    assert [each.value["number"] for each in whole] == [1, 2, 3]
    assert whole[0].value["prices"] == next_prices(1, first_prices())
    rest = await run_subscription(prices, "market.main", count=1, resume_token=whole[1].resume_token)
    assert rest[0].value["prices"] == whole[2].value["prices"]
    assert rest[0].value["run"] != whole[2].value["run"], "another run"
    assert all(set(each.value["prices"]) == set(COMPANIES) for each in whole)


@pytest.mark.parametrize("operation", list(Operation))
async def test_there_is_one_market_and_clients_do_not_publish_into_it(operation: Operation) -> None:
    assert await may(RecordingContext(), "main", operation) is (operation is not Operation.PUBLISH)
    assert not await may(RecordingContext(), "other", operation)


async def test_companies_have_names() -> None:
    assert await companies(RecordingContext()) == COMPANIES


@pytest.mark.parametrize("name", ["trunkline.js", "icon.svg"])
def test_what_both_pages_have_is_the_same(name: str) -> None:
    assert (EXAMPLES / "prices/static" / name).read_bytes() == (EXAMPLES / "chat/static" / name).read_bytes()
