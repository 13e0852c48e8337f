"""What an edge must still tell an owner. The whole protocol is tested in subscriptions/test_presences."""

from __future__ import annotations

from typing import Any, cast

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trunkline.edge.auth import Identity
from trunkline.edge.connection import Connection
from trunkline.edge.members import REQUEST_BYTES, TopicMembers
from trunkline.edge.protocols.plain import JSON
from trunkline.shared.presence import Member, Members, Told


def members(*names: str) -> TopicMembers:
    """With members that the owner knows."""
    found = TopicMembers("room.1")
    for name in names:
        found.join(Member(name))
    while told(found) is not None:
        pass
    return found


def told(found: TopicMembers, *, term: int = 7, again: bool = False) -> Members | None:
    """Lets the owner answer the next request, if there is one."""
    request = found.next("e1")
    if request is not None:
        found.told(Told(term, again))
    return request


def ids(request: Members | None) -> list[str]:
    return [] if request is None else [member.connection_id for member in request.joined]


def test_the_first_request_is_the_list_of_all_and_the_next_ones_what_has_changed() -> None:
    found = TopicMembers("room.1")
    found.join(Member("a"))
    found.join(Member("b"))
    request = told(found)
    assert request == Members("room.1", "e1", [Member("a"), Member("b")], [], 2, begins=True, ends=True)
    assert found.done
    found.join(Member("c"))
    found.leave("a")
    assert told(found) == Members("room.1", "e1", [Member("c")], ["a"], 2, known=7)
    assert told(found) is None


def test_one_request_is_under_way_at_a_time() -> None:
    found = members("a")
    found.join(Member("b"))
    assert ids(found.next("e1")) == ["b"]
    found.join(Member("c"))
    assert found.next("e1") is None
    found.told(Told(7))
    assert ids(found.next("e1")) == ["c"]


def test_after_a_failure_all_is_told() -> None:
    found = members("a", "b")
    found.leave("a")
    assert found.next("e1") is not None
    found.failed()
    found.join(Member("c"))
    request = told(found)
    assert (ids(request), request and request.begins, request and request.ends) == (["b", "c"], True, True)


def test_an_owner_with_room_again_is_told_all() -> None:
    found = members("a")
    found.join(Member("b"))
    told(found, again=True)
    assert ids(told(found)) == ["a", "b"]


def test_changes_are_not_collected_while_no_owner_answers() -> None:
    """Else an owner that stays away would fill the memory of an edge."""
    found = members("a")
    assert found.next("e1") is None
    found.failed()
    for number in range(1000):
        found.join(Member(str(number)))
        found.leave(str(number))
    assert not found._joined
    assert not found._left
    assert ids(told(found)) == ["a"]


def test_who_left_and_came_back_is_told_in_this_order() -> None:
    found = members(*(f"{number:040}" for number in range(3000)))
    for connection_id in list(found.by_id):
        found.leave(connection_id)
        found.join(Member(connection_id))
    seen = set(found.by_id)
    while (request := told(found)) is not None:
        seen -= set(request.left)
        seen |= set(ids(request))
    assert seen == set(found.by_id)


def test_that_the_last_one_has_left_is_told_with_the_term_that_knows_of_it() -> None:
    """A new owner must tell services that the topic is vacated, which the one before could not."""
    found = members("a")
    found.tell_all()
    found.leave("a")
    request = found.next("e1")
    assert request is not None
    assert (request.joined, request.total, request.known) == ([], 0, 7)
    found.told(Told(8))
    found.join(Member("b"))
    request = found.next("e1")
    assert request is not None
    assert request.known == 0


def test_that_somebody_watches_is_told() -> None:
    found = members("a")
    watcher = Connection("a", "chat", Identity(), JSON, settled=True)
    found.watch(watcher)
    request = told(found)
    assert request is not None
    assert (request.joined, request.watches) == ([], True)
    found.unwatch(watcher)
    request = told(found)
    assert request is not None
    assert not request.watches
    assert found.done
    found.unwatch(watcher)
    assert found.done


@given(st.lists(st.integers(0, 20_000), max_size=40))
def test_requests_are_bounded_in_bytes_and_hold_everybody(sizes: list[int]) -> None:
    found = TopicMembers("room.1")
    for number, size in enumerate(sizes):
        found.join(Member(f"e1.{number}", info=b"x" * size))
    requests: list[Any] = []
    while (request := told(found)) is not None:
        requests.append(request)
        assert len(msgspec.msgpack.encode(request)) < REQUEST_BYTES + 21_000
    assert [each.begins for each in requests] == [True] + [False] * (len(requests) - 1)
    assert [each.ends for each in requests] == [False] * (len(requests) - 1) + [True]
    assert [member for each in requests for member in cast("Members", each).joined] == list(found.by_id.values())
