"""How devices come in, and how rosters meet: whole conversations between cores with real keys."""

from __future__ import annotations

from itertools import pairwise

from shoal.effects import Announce, Commanded, Received
from shoal.membership.messages import (
    JoinChallenge,
    JoinHello,
    JoinProof,
    Refused,
    RosterKeys,
    RosterStatements,
)
from shoal.membership.roster import (
    Admitted,
    Confirm,
    Invite,
    MemberAdded,
    Rejected,
    Remove,
    Roster,
    RosterCore,
    RosterExchanged,
    UseInvitation,
    invitation_of,
    proof_of,
    statement_key,
)
from shoal.membership.timing import Timing
from tests.membership.devices import (
    SINCE_1970_S,
    Conversation,
    announced,
    cluster,
    roster_core,
    sent,
    stamp,
    statement,
)
from tests.membership.keys import keys_of
from tests.membership.keys import node_of as node

SECRET = b"sixteen bytes, s"
DAY_S = 86400.0


def members(of: Roster) -> set[str]:
    names = {node(name): name for name in "abcdefgh"}
    return {names[each] for each in of.members}


def test_a_signer_may_be_introduced_by_the_same_message_in_any_order() -> None:
    core = roster_core("a", cluster("a", "b"))
    late = (statement("add", "c", "d"), statement("add", "b", "c"))
    core.step(Received(node("b"), RosterStatements(late)), 0.0)
    assert members(core.roster) == {"a", "b", "c", "d"}


def test_what_comes_before_its_signer_is_known_counts_once_it_is() -> None:
    core = roster_core("a", cluster("a", "b"))
    core.step(Received(node("b"), RosterStatements((statement("add", "c", "d"),))), 0.0)
    assert members(core.roster) == {"a", "b"}
    core.step(Received(node("b"), RosterStatements((statement("add", "b", "c"),))), 1.0)
    assert members(core.roster) == {"a", "b", "c", "d"}


def test_a_removed_device_cannot_pass_on_anything() -> None:
    core = roster_core("a", [*cluster("a", "b"), statement("remove", "a", "b")])
    assert core.step(Received(node("b"), RosterStatements((statement("add", "a", "c"),))), 0.0) == []


def test_two_rosters_become_one() -> None:
    one = roster_core("a", [*cluster("a", "b"), statement("add", "a", "c")])
    other = roster_core("b", [*cluster("a", "b"), statement("add", "b", "d"), statement("remove", "b", "c")])
    talk = Conversation(a=one, b=other)
    talk.exchange(one, other)
    assert one.roster.digest == other.roster.digest
    assert members(one.roster) == members(other.roster) == {"a", "b", "d"}
    assert announced(talk.effects[node("a")], RosterExchanged) == [RosterExchanged(node("b"))]


def test_strangers_are_told_nothing() -> None:
    core = roster_core("a", cluster("a", "b"))
    assert core.step(Received(node("z"), RosterKeys((), is_answer=False)), 0.0) == []


def test_a_long_roster_arrives_whole_in_any_order() -> None:
    names = [f"device {number}" for number in range(300)]
    chain = [statement("found", names[0])]
    chain += [statement("add", before, name) for before, name in pairwise(names)]
    full = roster_core(names[0], sorted(chain, key=statement_key))
    behind = roster_core(names[1], chain[:2])
    talk = Conversation(a=full, b=behind)
    talk.exchange(behind, full)
    assert len(behind.roster.members) == 300


def joining(secret: bytes = SECRET, **cores: RosterCore) -> tuple[Conversation, RosterCore, RosterCore]:
    member = cores.get("member") or roster_core("a", cluster("a", "b"))
    if not member.roster.invitations:
        member.step(Commanded(Invite(invitation_of(SECRET), SINCE_1970_S + 3600.0)), 0.0)
    joiner = cores.get("joiner") or roster_core("c")
    talk = Conversation(member=member, joiner=joiner)
    command = UseInvitation(member.me, secret, b"fresh chance", "phone", ("10.0.0.3:7433",))
    talk.effects[joiner.me].clear()
    talk.command(joiner, command)
    return talk, member, joiner


def test_a_device_joins_by_a_token() -> None:
    talk, member, joiner = joining()
    assert announced(talk.effects[joiner.me], Admitted) == [Admitted(member.roster.cluster)]
    assert announced(talk.effects[member.me], MemberAdded) == [MemberAdded(joiner.me)]
    assert joiner.roster.digest == member.roster.digest
    device = member.roster.members[joiner.me]
    assert (device.name, device.addresses, device.public_key) == ("phone", ("10.0.0.3:7433",), keys_of("c").public_key)


def test_a_device_joins_a_cluster_with_a_long_roster() -> None:
    names = ["a", *(f"device {number}" for number in range(300))]
    chain = [statement("found", "a")]
    chain += [statement("add", before, name) for before, name in pairwise(names)]
    talk, member, joiner = joining(member=roster_core("a", sorted(chain, key=statement_key)))
    assert announced(talk.effects[joiner.me], Admitted) == [Admitted(member.roster.cluster)]
    assert joiner.roster.digest == member.roster.digest


def test_who_knows_only_the_invitations_name_is_refused() -> None:
    """The hash of the secret is in every member's roster; the proof needs the secret itself only to make that hash."""
    member = roster_core("a", cluster("a", "b"))
    member.step(Commanded(Invite(invitation_of(SECRET), SINCE_1970_S + 3600.0)), 0.0)
    joiner, invitation = keys_of("c"), invitation_of(SECRET)
    effects = member.step(Received(node("c"), JoinHello(invitation, joiner.public_key, b"n")), 1.0)
    challenge = sent(effects, JoinChallenge)[0]
    wrong = proof_of("00" * 32, joiner.public_key, challenge.public_key, b"n", challenge.nonce)
    signature = joiner.sign(b"join" + node("a").encode() + b"n" + challenge.nonce)
    effects = member.step(Received(node("c"), JoinProof(invitation, joiner.public_key, "", (), wrong, signature)), 1.0)
    assert "secret is wrong" in sent(effects, Refused)[0].text
    assert node("c") not in member.roster.members


def test_a_proof_for_another_member_or_conversation_is_worth_nothing() -> None:
    member = roster_core("a", cluster("a", "b"))
    member.step(Commanded(Invite(invitation_of(SECRET), SINCE_1970_S + 3600.0)), 0.0)
    joiner, invitation = keys_of("c"), invitation_of(SECRET)
    challenge = sent(member.step(Received(node("c"), JoinHello(invitation, joiner.public_key, b"n")), 1.0), JoinChallenge)[0]

    def answer(member_key: bytes, nonce: bytes, signed_nonce: bytes) -> str:
        proof = proof_of(invitation, joiner.public_key, member_key, b"n", nonce)
        signature = joiner.sign(b"join" + node("a").encode() + b"n" + signed_nonce)
        message = JoinProof(invitation, joiner.public_key, "", (), proof, signature)
        effects = member.step(Received(node("c"), message), 1.0)
        return sent(effects, Refused)[0].text if sent(effects, Refused) else ""

    assert "secret is wrong" in answer(keys_of("b").public_key, challenge.nonce, challenge.nonce)
    assert "secret is wrong" in answer(challenge.public_key, b"an old nonce", challenge.nonce)
    assert "signature" in answer(challenge.public_key, challenge.nonce, b"an old nonce")
    assert node("c") not in member.roster.members
    assert answer(challenge.public_key, challenge.nonce, challenge.nonce) == ""
    assert node("c") in member.roster.members


def test_a_used_invitation_lets_nobody_else_in() -> None:
    _, member, _ = joining()
    talk, _, other = joining(member=member, joiner=roster_core("d"))
    assert "has been used" in announced(talk.effects[other.me], Rejected)[0].text
    assert other.me not in member.roster.members


def test_a_removed_key_never_joins_again() -> None:
    _, member, joiner = joining()
    member.step(Commanded(Remove(joiner.me)), 2.0)
    member.step(Commanded(Invite(invitation_of(b"a second secret."), SINCE_1970_S + 3600.0)), 3.0)
    hello = JoinHello(invitation_of(b"a second secret."), keys_of("c").public_key, b"n")
    refused = sent(member.step(Received(joiner.me, hello), 4.0), Refused)
    assert "make a new one" in refused[0].text


def test_a_lost_answer_is_given_again() -> None:
    member = roster_core("a", cluster("a", "b"))
    member.step(Commanded(Invite(invitation_of(SECRET), SINCE_1970_S + 3600.0)), 0.0)
    joiner = roster_core("c")
    hello = sent(joiner.step(Commanded(UseInvitation(node("a"), SECRET, b"n")), 1.0), JoinHello)[0]
    challenge = sent(member.step(Received(node("c"), hello), 1.0), JoinChallenge)[0]
    proof = sent(joiner.step(Received(node("a"), challenge), 1.0), JoinProof)[0]
    first = sent(member.step(Received(node("c"), proof), 1.0), RosterStatements)
    again = sent(member.step(Received(node("c"), proof), 2.0), RosterStatements)
    assert first == again
    assert len(member.roster.statements) == 4


def test_a_device_that_slept_through_a_removal_does_not_trust_the_removed_one() -> None:
    """The sleeper's roster still lists it; only a third member's fresh stamp would make it trusted, and it gets none."""
    removed_on_day_s = 2 * DAY_S
    sleeper = roster_core("a", cluster("a", "b", "c", "d"))
    sleeper.give_stamp(node("b"), SINCE_1970_S, is_sure=True)
    old = stamp("c", "b", SINCE_1970_S + removed_on_day_s)
    refused = sleeper.judge(node("b"), (old,), SINCE_1970_S + removed_on_day_s + Timing().stamp_valid_s + 1)
    assert refused is not None
    assert refused.reason == "unstamped"


def test_where_all_slept_for_long_more_than_half_of_the_others_bring_a_member_back() -> None:
    """Nobody can be sure then; the removed one would need most of the cluster not to know of its removal."""
    core, now_s = roster_core("a", cluster("a", "b", "c", "d", "e", "f")), SINCE_1970_S + 100 * DAY_S
    unsure = [stamp(name, "b", now_s, is_sure=False) for name in "acd"]
    assert core.judge(node("b"), unsure[:2], now_s) is not None
    assert core.judge(node("b"), unsure, now_s) is None
    assert core.judge(node("b"), [unsure[1]] * 3, now_s) is not None, "each counts once"


def test_a_device_outside_has_no_say() -> None:
    """What it signs now would count once it is let in."""
    core = roster_core("c")
    for command in (Remove(node("a")), Invite("01" * 32, SINCE_1970_S + 100), Confirm(node("b"))):
        effects = core.step(Commanded(command), 0.0)
        assert [type(effect) for effect in effects] == [Announce]
        assert "join by an invitation first" in announced(effects, Rejected)[0].text
    assert not core.roster.statements
