"""Rosters are sets, and what they mean does not depend on the way they came together."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.effects import Announce, Commanded, Effect, Hangup, Received, Send, SetTimer, Store, TimerFired
from shoal.ids import NodeId
from shoal.membership.messages import (
    JoinChallenge,
    JoinHello,
    JoinProof,
    Refused,
    RosterStatements,
    Stamp,
    StampGiven,
    Statement,
)
from shoal.membership.roster import (
    EMPTY,
    TIMER,
    Admitted,
    Confirm,
    Found,
    InvitationOverused,
    Invite,
    MemberAdded,
    MemberRemoved,
    Rejected,
    Remove,
    Roster,
    RosterCore,
    SetAddresses,
    UseInvitation,
    invitation_of,
    signed_text,
    statement_key,
)
from shoal.membership.timing import Timing
from tests.membership.keys import keys_of, names, node_of, roster_of, say

SECRET = b"0123456789abcdef"
INVITATION = invitation_of(SECRET)
DAY_S = 86400.0
PEOPLE = ("ann", "bob", "cem", "dua", "eve")


def core_of(name: str, *statements: Statement, since_1970_s: float = 0.0) -> RosterCore:
    roster = roster_of(*statements) if statements else EMPTY
    return RosterCore(node_of(name), keys_of(name), timing=Timing(), since_1970_s=since_1970_s, roster=roster)


def facts(effects: list[Effect]) -> list[object]:
    return [effect.fact for effect in effects if isinstance(effect, Announce)]


def sent(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


# ---- what a set means


FOUND = say("found", "ann", "ann")
ADD_BOB = say("add", "ann", "bob", 1)
ADD_CEM = say("add", "bob", "cem", 2)


def test_members_are_whoever_a_member_added() -> None:
    assert names(roster_of(FOUND, ADD_BOB, ADD_CEM)) == {"ann", "bob", "cem"}
    assert names(roster_of(FOUND, ADD_CEM)) == {"ann"}, "nobody here knows who bob is"


def test_removal_wins_for_ever() -> None:
    remove = say("remove", "cem", "bob", 3, keeps=(statement_key(ADD_CEM),))
    again = say("add", "ann", "bob", 4)
    roster = roster_of(FOUND, ADD_BOB, ADD_CEM, remove, again)
    assert names(roster) == {"ann", "cem"}
    assert node_of("bob") in roster.removed


def test_what_a_removed_device_signed_counts_only_if_kept() -> None:
    late = say("add", "bob", "dua", 9)
    remove = say("remove", "ann", "bob", 3, keeps=(statement_key(ADD_CEM),))
    assert names(roster_of(FOUND, ADD_BOB, ADD_CEM, remove, late)) == {"ann", "cem"}


def test_two_that_remove_each_other_are_both_out() -> None:
    roster = roster_of(FOUND, ADD_BOB, ADD_CEM, say("remove", "bob", "cem", 3), say("remove", "cem", "bob", 3))
    assert names(roster) == {"ann"}


def test_the_latest_addresses_count() -> None:
    old = say("address", "bob", "bob", 5, addresses=("10.0.0.1:1",))
    new = say("address", "bob", "bob", 6, addresses=("10.0.0.2:1",))
    for order in ((old, new), (new, old)):
        assert roster_of(FOUND, ADD_BOB, *order).members[node_of("bob")].addresses == ("10.0.0.2:1",)


INVITE = say("invite", "ann", "ann", 1, invitation=INVITATION, expires_s=DAY_S, uses=1)
CAME_BOB = say("add", "ann", "bob", 2, invitation=INVITATION)
CAME_CEM = say("add", "ann", "cem", 2, invitation=INVITATION)


def test_two_keys_on_one_token_wait_until_one_is_confirmed() -> None:
    both = (FOUND, INVITE, CAME_BOB, CAME_CEM)
    roster = roster_of(*both)
    assert names(roster) == {"ann"}
    assert set(roster.waiting[INVITATION]) == {node_of("bob"), node_of("cem")}
    confirmed = roster_of(*both, say("confirm", "ann", "bob", 3, invitation=INVITATION))
    assert names(confirmed) == {"ann", "bob"}
    assert confirmed.waiting == {INVITATION: (node_of("cem"),)}


def test_who_waits_cannot_confirm_itself() -> None:
    roster = roster_of(FOUND, INVITE, CAME_BOB, CAME_CEM, say("confirm", "bob", "bob", 3, invitation=INVITATION))
    assert names(roster) == {"ann"}


def test_removing_the_wrong_one_settles_it_too() -> None:
    roster = roster_of(FOUND, INVITE, CAME_BOB, CAME_CEM, say("remove", "ann", "cem", 3))
    assert names(roster) == {"ann", "bob"}
    assert roster.waiting == {}


def test_a_removal_voids_invitations_made_before_it() -> None:
    assert INVITATION in roster_of(FOUND, ADD_BOB, INVITE).invitations
    assert INVITATION not in roster_of(FOUND, ADD_BOB, INVITE, say("remove", "ann", "bob", 3)).invitations


# ---- laws of the union


@st.composite
def statement_sets(draw: st.DrawFn) -> list[Statement]:
    people = st.sampled_from(PEOPLE)
    statements = [FOUND]
    for index in range(draw(st.integers(0, 14))):
        kind = draw(st.sampled_from(["add", "add", "add", "remove", "address", "invite", "confirm"]))
        signer, subject, at_s = draw(people), draw(people), float(draw(st.integers(0, 4)))
        if kind == "add":
            invitation = draw(st.sampled_from(["", "", "i1", "i2"]))
            statements.append(say("add", signer, subject, at_s, invitation=invitation))
        elif kind == "remove":
            keeps = tuple(
                statement_key(each) for each in statements if each.signer == node_of(subject) and draw(st.booleans())
            )
            statements.append(say("remove", signer, subject, at_s, keeps=keeps))
        elif kind == "address":
            statements.append(say("address", signer, signer, at_s, addresses=(f"{index}:1",)))
        elif kind == "invite":
            uses = draw(st.integers(1, 2))
            statements.append(say("invite", signer, signer, at_s, invitation=draw(st.sampled_from(["i1", "i2"])), uses=uses))
        else:
            statements.append(say("confirm", signer, subject, at_s, invitation=draw(st.sampled_from(["i1", "i2"]))))
    return statements


def meaning(roster: Roster) -> tuple[object, ...]:
    return (roster.members, roster.removed, roster.waiting, roster.invitations, roster.digest, roster.cluster)


@given(statements=statement_sets(), seed=st.integers(0, 1000))
def test_order_and_repetition_do_not_matter(statements: list[Statement], seed: int) -> None:
    whole = roster_of(*statements)
    chance = random.Random(seed)
    shuffled = chance.sample(statements, len(statements)) + chance.choices(statements, k=3)
    grown = EMPTY
    while shuffled:
        taken = shuffled[: chance.randint(1, 4)]
        del shuffled[: len(taken)]
        grown = grown.with_statements({statement_key(each): each for each in taken})
    assert meaning(grown) == meaning(whole)
    assert meaning(whole.with_statements(dict(whole.statements))) == meaning(whole)


@given(statements=statement_sets(), more=statement_sets())
def test_removal_wins_over_whatever_else_is_said(statements: list[Statement], more: list[Statement]) -> None:
    before = roster_of(*statements)
    after = roster_of(*statements, *more)
    assert before.removed <= after.removed
    for roster in (before, after):
        held_back = {node for nodes in roster.waiting.values() for node in nodes}
        assert not roster.members.keys() & (roster.removed | held_back)


@given(parts=st.lists(statement_sets(), min_size=2, max_size=3))
def test_cores_that_exchange_in_any_order_agree(parts: list[list[Statement]]) -> None:
    """By the code that runs: signatures are checked, and what comes twice is not stored twice."""
    batches = [RosterStatements(tuple(part)) for part in parts]
    results = []
    for order in (batches, batches[::-1]):
        core = core_of("ann", FOUND)
        for batch in order * len(order):  # a signer's key may come last; cores exchange until they agree
            core.step(Received(node_of("zoe"), batch), 1.0)
        results.append(core.roster)
        assert core.step(Received(node_of("zoe"), order[0]), 1.0) == []
    assert meaning(results[0]) == meaning(results[1])


# ---- the core


def test_a_forged_statement_is_nothing() -> None:
    core = core_of("ann", FOUND)
    forged = msgspec.structs.replace(ADD_BOB, signature=keys_of("eve").sign(signed_text(ADD_BOB)))
    assert core.step(Received(node_of("eve"), RosterStatements((forged,))), 1.0) == []
    wrong_key = msgspec.structs.replace(ADD_BOB, public_key=keys_of("eve").public_key)
    assert core.step(Received(node_of("eve"), RosterStatements((wrong_key,))), 1.0) == []
    assert names(core.roster) == {"ann"}


def test_another_cluster_does_not_merge() -> None:
    core = core_of("ann", FOUND)
    other = RosterStatements((say("found", "eve", "eve"), say("add", "eve", "ann")))
    core.step(Received(node_of("eve"), other), 1.0)
    assert names(core.roster) == {"ann"}


def test_statements_are_stored_and_read_again() -> None:
    core = core_of("ann")
    stored = {}
    for command in (Found("ann"), SetAddresses(("here:1",)), SetAddresses(("there:1",))):
        for effect in core.step(Commanded(command), 5.0):
            if isinstance(effect, Store):
                stored[effect.key] = effect.value
    again = RosterCore(node_of("ann"), keys_of("ann"), timing=Timing(), since_1970_s=0.0, stored=stored)
    assert meaning(again.roster) == meaning(core.roster)
    assert again.roster.members[node_of("ann")].addresses == ("there:1",), "said in the same second, and later"


def test_removing_hangs_up_and_keeps_what_was_said_before() -> None:
    core = core_of("ann", FOUND, ADD_BOB, ADD_CEM)
    effects = core.step(Commanded(Remove(node_of("bob"))), 9.0)
    assert MemberRemoved(node_of("bob")) in facts(effects)
    assert [effect.peer for effect in effects if isinstance(effect, Hangup)] == [node_of("bob")]
    assert names(core.roster) == {"ann", "cem"}
    late = RosterStatements((say("add", "bob", "dua", 10),))
    core.step(Received(node_of("bob"), late), 10.0)
    assert names(core.roster) == {"ann", "cem"}


def admit(member: RosterCore, name: str, secret: bytes = SECRET, now_s: float = 10.0) -> tuple[RosterCore, list[Effect]]:
    """Lets `name` join at `member`; returns the joiner and the last effects at it."""
    joiner = core_of(name)
    me, host = node_of(name), member.me
    effects = joiner.step(Commanded(UseInvitation(host, secret, b"nonce of " + name.encode(), name)), now_s)
    for _ in range(4):
        messages = sent(effects)
        if not messages:
            break
        replies = [reply for message in messages for reply in sent(member.step(Received(me, message), now_s)) if reply]  # type: ignore[arg-type]
        effects = []
        for reply in replies:
            effects += joiner.step(Received(host, reply), now_s)  # type: ignore[arg-type]
    return joiner, effects


def test_what_a_device_says_before_it_belongs_anywhere_is_nothing() -> None:
    core = core_of("bob")
    for command in (SetAddresses(("h:1",)), Remove(node_of("ann")), Invite(INVITATION, 9.0), Confirm(node_of("ann"))):
        assert {type(effect) for effect in core.step(Commanded(command), 1.0)} <= {Announce}, "its owner may be told why"
    assert core.roster.statements == {}


def inviting(uses: int = 1) -> RosterCore:
    core = core_of("ann", FOUND)
    core.step(Commanded(Invite(INVITATION, 100.0, uses)), 5.0)
    return core


def test_an_invited_device_is_admitted_by_proof() -> None:
    member = inviting()
    joiner, effects = admit(member, "bob")
    assert Admitted(member.roster.cluster) in facts(effects)
    assert meaning(joiner.roster) == meaning(member.roster)
    assert names(member.roster) == {"ann", "bob"}
    assert member.roster.members[node_of("bob")].added_by == node_of("ann")


@pytest.mark.parametrize(
    ("secret", "now_s", "uses", "text"),
    [
        (b"another secret..", 10.0, 1, "no such invitation"),
        (SECRET, 101.0, 1, "expired"),
        (SECRET, 10.0, 0, "has been used"),
    ],
)
def test_a_refusal_says_why(secret: bytes, now_s: float, uses: int, text: str) -> None:
    member = inviting(uses)
    joiner, effects = admit(member, "bob", secret, now_s)
    (rejected,) = facts(effects)
    assert isinstance(rejected, Rejected)
    assert text in rejected.text
    assert names(member.roster) == {"ann"}
    assert joiner.step(TimerFired(TIMER), now_s + 9) == [], "a refused joiner does not ask again by itself"


def test_a_joiner_asks_again_until_it_is_answered() -> None:
    joiner = core_of("bob")
    first = joiner.step(Commanded(UseInvitation(node_of("ann"), SECRET, b"n")), 0.0)
    assert any(isinstance(effect, SetTimer) and effect.key == TIMER for effect in first)
    assert sent(joiner.step(TimerFired(TIMER), 1.0)) == sent(first)


def test_a_proof_is_good_for_its_conversation_only() -> None:
    """What an eavesdropper saw of one joining does not let it in, nor does the secret without the key."""
    member = inviting()
    bob = core_of("bob")
    hello = sent(bob.step(Commanded(UseInvitation(node_of("ann"), SECRET, b"n1")), 10.0))[0]
    assert isinstance(hello, JoinHello)
    challenge = sent(member.step(Received(node_of("bob"), hello), 10.0))[0]
    assert isinstance(challenge, JoinChallenge)
    assert sent(member.step(Received(node_of("bob"), hello), 11.0)) == [challenge], "asked again, the same answer"
    proof = sent(bob.step(Received(node_of("ann"), challenge), 10.0))[0]
    assert isinstance(proof, JoinProof)
    other = msgspec.structs.replace(hello, nonce=b"n2")
    member.step(Received(node_of("bob"), other), 12.0)
    (refused,) = sent(member.step(Received(node_of("bob"), proof), 12.0))
    assert isinstance(refused, Refused)
    assert "secret is wrong" in refused.text
    stolen = JoinHello(INVITATION, keys_of("bob").public_key, b"n3")
    (refused,) = sent(member.step(Received(node_of("eve"), stolen), 12.0))
    assert isinstance(refused, Refused)
    assert names(member.roster) == {"ann"}


def test_a_joiner_takes_no_roster_that_did_not_make_its_invitation() -> None:
    joiner = core_of("bob")
    joiner.step(Commanded(UseInvitation(node_of("eve"), SECRET, b"n")), 0.0)
    theirs = RosterStatements((say("found", "eve", "eve"), say("add", "eve", "bob", invitation=INVITATION)))
    assert facts(joiner.step(Received(node_of("eve"), theirs), 1.0)) == []
    assert joiner.roster.members == {}


def test_any_member_admits_when_the_inviter_is_gone() -> None:
    member = inviting(uses=2)
    bob, _ = admit(member, "bob")
    admit(bob, "cem")
    assert names(bob.roster) == {"ann", "bob", "cem"}


def test_two_joiners_on_both_sides_of_a_cut_wait_for_the_owner() -> None:
    ann = inviting()
    ann.step(Received(node_of("ann"), RosterStatements((ADD_BOB,))), 6.0)
    bob = RosterCore(node_of("bob"), keys_of("bob"), timing=Timing(), since_1970_s=0.0, roster=ann.roster)
    admit(ann, "cem")
    admit(bob, "dua")
    effects = ann.step(Received(node_of("bob"), RosterStatements(tuple(bob.roster.statements.values()))), 20.0)
    assert names(ann.roster) == {"ann", "bob"}
    assert InvitationOverused(INVITATION, tuple(sorted((node_of("cem"), node_of("dua"))))) in facts(effects)
    assert MemberRemoved(node_of("cem")) in facts(effects)
    effects = ann.step(Commanded(Confirm(node_of("dua"))), 21.0)
    assert MemberAdded(node_of("dua")) in facts(effects)
    assert names(ann.roster) == {"ann", "bob", "dua"}


# ---- stamps


def stamp(signer: str, subject: str, at_s: float, *, is_sure: bool = True) -> Stamp:
    blank = Stamp(node_of(signer), node_of(subject), at_s, is_sure)
    return msgspec.structs.replace(blank, signature=keys_of(signer).sign(signed_text(blank)))


ALL = (FOUND, ADD_BOB, say("add", "ann", "cem", 2), say("add", "ann", "dua", 2))


@pytest.mark.parametrize(
    ("stamps", "reason"),
    [
        ([], "unstamped"),
        ([stamp("bob", "cem", 19 * DAY_S)], None),
        ([stamp("bob", "cem", 12 * DAY_S)], "unstamped"),
        ([stamp("bob", "cem", 21 * DAY_S)], "unstamped"),
        ([stamp("cem", "cem", 19 * DAY_S)], "unstamped"),
        ([stamp("eve", "cem", 19 * DAY_S)], "unstamped"),
        ([stamp("bob", "dua", 19 * DAY_S)], "unstamped"),
        ([msgspec.structs.replace(stamp("bob", "cem", 19 * DAY_S), at_s=19.5 * DAY_S)], "unstamped"),
        ([stamp("bob", "cem", 19 * DAY_S, is_sure=False)], "of three others, two still list it"),
    ],
)
def test_a_third_member_must_have_vouched_within_a_week(stamps: list[Stamp], reason: str | None) -> None:
    core = core_of("ann", *ALL)
    refused = core.judge(node_of("cem"), stamps, 20 * DAY_S)
    if reason == "unstamped":
        assert refused is not None
        assert refused.reason == "unstamped"
    else:
        assert refused is None


def test_one_unsure_stamp_does_not_do_in_a_larger_cluster() -> None:
    core = core_of("ann", *ALL, say("add", "ann", "eve", 2))
    unsure = [stamp(name, "cem", 19 * DAY_S, is_sure=False) for name in ("bob", "dua")]
    assert core.judge(node_of("cem"), unsure[:1], 20 * DAY_S) is not None
    assert core.judge(node_of("cem"), unsure, 20 * DAY_S) is None


def test_in_a_pair_the_peer_is_all_there_is() -> None:
    assert core_of("ann", FOUND, ADD_BOB).judge(node_of("bob"), [], 20 * DAY_S) is None


def test_who_was_met_within_a_week_is_trusted_and_who_was_removed_never() -> None:
    core = core_of("ann", *ALL)
    core.give_stamp(node_of("cem"), 15 * DAY_S, is_sure=True)
    assert core.judge(node_of("cem"), [], 20 * DAY_S) is None
    assert core.judge(node_of("cem"), [], 23 * DAY_S) is not None
    core.step(Commanded(Remove(node_of("cem"))), 16 * DAY_S)
    refused = core.judge(node_of("cem"), [stamp("bob", "cem", 19 * DAY_S)], 20 * DAY_S)
    assert refused is not None
    assert refused.reason == "removed"


def test_an_unknown_peer_needs_a_voucher_that_was_met_lately() -> None:
    """Otherwise a removed device could add a new key of its own, and come back as that to one that slept."""
    offer = (say("add", "bob", "eve", 19 * DAY_S),)
    asleep, awake = core_of("ann", *ALL), core_of("ann", *ALL)
    awake.give_stamp(node_of("bob"), 18 * DAY_S, is_sure=True)
    for core, is_taken in ((asleep, False), (awake, True)):
        core.consider_offer(node_of("eve"), offer, [], 20 * DAY_S)
        assert (node_of("eve") in core.roster) == is_taken


def test_stamps_are_kept_and_the_best_shown() -> None:
    core = core_of("cem", *ALL)
    for signer, at_s, is_sure in (("ann", 5.0, True), ("bob", 9.0, False), ("dua", 7.0, True)):
        core.step(Received(node_of(signer), StampGiven(stamp(signer, "cem", at_s, is_sure=is_sure))), 10.0)
    core.step(Received(node_of("ann"), StampGiven(stamp("bob", "cem", 10.0))), 10.0)  # not by who sent it
    shown = [(each.signer, each.at_s) for each in core.shown_stamps(10.0)]
    assert shown == [(node_of("dua"), 7.0), (node_of("ann"), 5.0), (node_of("bob"), 9.0)]
    assert core.shown_stamps(30 * DAY_S)[0].at_s == 9.0, "none is good any more: then many are shown, the freshest first"


def test_ids_are_hashes_of_keys() -> None:
    assert keys_of("ann").identify(keys_of("bob").public_key) == node_of("bob")
    assert len(NodeId(node_of("ann"))) == 32
