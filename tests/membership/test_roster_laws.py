"""A roster is a function of a set: whatever is signed, and in whatever order it arrives."""

from __future__ import annotations

from itertools import permutations
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from shoal.effects import Announce, Effect, Received, Store
from shoal.ids import NodeId
from shoal.membership.messages import RosterStatements, Statement
from shoal.membership.roster import MemberAdded, MemberRemoved, Roster, statement_key
from tests.membership.devices import SINCE_1970_S, cluster, roster_core, statement
from tests.membership.keys import node_of as node
from tests.membership.keys import roster_of as roster

NAMES = "abcde"
FOUND = cluster("a")[0]
INVITATIONS = ("01" * 32, "02" * 32)


def pool() -> list[Statement]:
    """Everything five devices may say of each other, sensible or not."""
    found = []
    for number, (signer, subject) in enumerate(permutations(NAMES, 2)):
        at_s = SINCE_1970_S + number
        add = statement("add", signer, subject, at_s=at_s)
        invited = statement("add", signer, subject, at_s=at_s, invitation=INVITATIONS[number % 2])
        found += [add, invited]
        found.append(statement("remove", signer, subject, at_s=at_s))
        found.append(statement("confirm", signer, subject, at_s=at_s, invitation=INVITATIONS[number % 2]))
    for remover, removed, kept in permutations(NAMES, 3):
        keeps = (statement_key(statement("add", removed, kept, at_s=SINCE_1970_S + pair_number(removed, kept))),)
        found.append(statement("remove", remover, removed, at_s=SINCE_1970_S + 50, keeps=keeps))
    for number, name in enumerate(NAMES):
        found.append(statement("address", name, at_s=SINCE_1970_S + number % 2, addresses=(f"10.0.0.{number}:7433",)))
        found.append(statement("address", name, at_s=SINCE_1970_S + 1, addresses=(f"10.0.1.{number}:7433",)))
        for invitation in INVITATIONS:
            expires_s = SINCE_1970_S + 100 + number
            found.append(
                statement(
                    "invite", name, at_s=SINCE_1970_S + 10 * number, invitation=invitation, expires_s=expires_s, uses=1
                )
            )
    return found


def pair_number(signer: str, subject: str) -> int:
    return list(permutations(NAMES, 2)).index((signer, subject))


POOL = pool()
statements = st.lists(st.sampled_from(POOL), max_size=24)


def meaning(of: Roster) -> tuple[object, ...]:
    return (of.cluster, of.members, of.removed, of.waiting, of.invitations, of.digest)


def keyed(said: list[Statement]) -> dict[str, Statement]:
    return {statement_key(each): each for each in said}


@given(statements, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(said: list[Statement], chance: Random) -> None:
    shuffled = [FOUND, *said]
    chance.shuffle(shuffled)
    assert meaning(roster(FOUND, *said)) == meaning(roster(*shuffled))


@given(statements, statements, statements)
def test_merging_is_a_union(one: list[Statement], two: list[Statement], three: list[Statement]) -> None:
    start = roster(FOUND)
    both = start.with_statements(keyed(one)).with_statements(keyed(two))
    assert meaning(both) == meaning(start.with_statements(keyed(two)).with_statements(keyed(one)))
    assert meaning(both) == meaning(both.with_statements(keyed(one))), "saying it again changes nothing"
    at_once = start.with_statements(keyed([*one, *two, *three]))
    assert meaning(both.with_statements(keyed(three))) == meaning(at_once)


@given(statements, statements)
def test_a_removal_wins_for_ever(before: list[Statement], after: list[Statement]) -> None:
    early, late = roster(FOUND, *before), roster(FOUND, *before, *after)
    assert early.removed <= late.removed
    assert not late.members.keys() & late.removed
    assert not {waiting for each in late.waiting.values() for waiting in each} & late.members.keys()


@given(statements)
def test_everyone_who_is_in_was_let_in_by_a_chain_from_the_founder(said: list[Statement]) -> None:
    found = roster(FOUND, *said)
    adds = {(each.signer, each.subject) for each in said if each.kind == "add"}
    reached, fringe = {node("a")}, [node("a")]
    while fringe:
        signer = fringe.pop()
        for by, subject in adds:
            if by == signer and subject not in reached:
                reached.add(subject)
                fringe.append(subject)
    assert found.members.keys() <= reached


@given(statements, st.integers(1, 5), st.randoms(use_true_random=False))
def test_cores_take_statements_in_any_parts_and_order(said: list[Statement], size: int, chance: Random) -> None:
    """Even before their signers' keys, and more than once."""
    said = [each for each in said if (each.kind, each.subject) != ("remove", node("a"))]
    cores = [roster_core("a", [FOUND]) for _ in range(2)]
    for core in cores:
        order = [*said, *said[:3]]
        chance.shuffle(order)
        effects: list[Effect] = []
        for start in range(0, len(order), size):
            effects += core.step(Received(node("z"), RosterStatements(tuple(order[start : start + size]))), 0.0)
        assert followed(effects) == core.roster.members.keys(), "the facts tell the same story"
        disk = {each.key: each.value for each in effects if type(each) is Store}
        assert meaning(roster_core("a", [FOUND], stored=disk).roster) == meaning(core.roster)
    assert meaning(cores[0].roster) == meaning(cores[1].roster)


def followed(effects: list[Effect]) -> set[NodeId]:
    """Who is in, by what was announced."""
    members = {node("a")}
    for effect in effects:
        if type(effect) is Announce and type(effect.fact) is MemberAdded:
            assert effect.fact.node not in members
            members.add(effect.fact.node)
        elif type(effect) is Announce and type(effect.fact) is MemberRemoved:
            members.remove(effect.fact.node)
    return members
