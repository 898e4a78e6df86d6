"""What a plan may do to a simulated cluster, one line of text each.

    at 1.5 freeze b            `b` gets nothing; what arrives waits for `thaw`
    at 2 cut a > b             nothing comes from `a` to `b`; `cut a - b` is both ways, `mend` undoes either
    at 3 split a b | c         nothing crosses the bar; `mend all` undoes all cuts
    at 4 power-cut a b         at once, without a word; `crash` is of the process: its system closes its links
    at 5 start a losing votes  `losing everything` is another disk, the key apart; without it the disk is as it was
    at 6 suspend a; wake a     its clock goes on, it hears nothing

All verbs with their forms are in `FORMS`. A plan is also how a failure is kept: the shrinker prints one.
"""

from __future__ import annotations

import msgspec

FORMS = {
    "new": "new DEVICE                      a device without a roster",
    "found": "found DEVICE                    it starts a cluster of one",
    "invite": "invite TOKEN DEVICE [USES]      DEVICE makes an invitation",
    "use": "use TOKEN DEVICE VIA            DEVICE joins by it, asking VIA",
    "confirm": "confirm DEVICE BY               of those that came by an overused invitation, DEVICE is right",
    "remove": "remove DEVICE BY                the owner removes it, at BY",
    "quit": "quit DEVICE                     it says goodbye and stops",
    "create": "create GROUP DEVICE             it starts a group of one",
    "enter": "enter GROUP DEVICE [PART]       it asks to be taken in; PART is active or witness",
    "exit": "exit GROUP DEVICE               it asks to be let go",
    "recover": "recover GROUP DEVICE            the owner's last resort, at DEVICE",
    "crash": "crash DEVICE...                 the process ends; the system closes its links",
    "power-cut": "power-cut DEVICE...             all at once, without a word",
    "start": "start DEVICE [losing votes|losing everything]",
    "freeze": "freeze DEVICE                   it runs no more; what arrives waits",
    "thaw": "thaw DEVICE                     and now it gets it all",
    "suspend": "suspend DEVICE                  it sleeps; what arrives is lost",
    "wake": "wake DEVICE                     its clock went on meanwhile",
    "cut": "cut A > B | cut A - B           one direction, or both",
    "mend": "mend A > B | mend A - B | mend all",
    "split": "split A B | C ...               nothing crosses the bars",
    "network": "network KEY=VALUE...            loss, duplicate (shares), delay, jitter (seconds)",
    "disk": "disk DEVICE SECONDS             how long its writes take",
    "lose": "lose DEVICE                     it ends and never comes back",
    "ambush": "ambush MACHINE STATE FAULT      the next device that gets into STATE meets FAULT there and then",
    "say": "say TEXT                        a line in the story",
}
"""Every verb, as `shoal simulate --help-actions` and errors show it."""

_ARGUMENTS = {
    "new": (1, 1), "found": (1, 1), "invite": (2, 3), "use": (3, 3), "confirm": (2, 2), "remove": (2, 2), "quit": (1, 1),
    "create": (2, 2), "enter": (2, 3), "exit": (2, 2), "recover": (2, 2), "crash": (1, 1000), "power-cut": (1, 1000),
    "start": (1, 3), "freeze": (1, 1), "thaw": (1, 1), "suspend": (1, 1), "wake": (1, 1), "cut": (3, 3), "mend": (1, 3),
    "split": (1, 2000), "network": (1, 4), "disk": (2, 2), "lose": (1, 1),
    "ambush": (3, 3), "say": (1, 1000),
}  # fmt: skip

FAULTS = (
    "crash",
    "power-cut",
    "losing-votes",
    "losing-everything",
    "freeze",
    "suspend",
    "cut",
    "one-way-cut",
    "split",
    "network",
    "disk",
    "remove",
    "quit",
    "exit",
)
"""What the swarm lets every state meet."""


class Action(msgspec.Struct, frozen=True):
    """`verb` with `arguments`, `at_s` after the beginning."""

    at_s: float
    verb: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"at {self.at_s:.3f} {self.verb} {' '.join(self.arguments)}"

    def devices(self) -> frozenset[str]:
        """Whom it is about."""
        chosen: tuple[str, ...]
        if self.verb in ("create", "enter", "exit", "recover"):
            chosen = self.arguments[1:2]
        elif self.verb in ("invite", "use"):
            chosen = self.arguments[1:2] if self.verb == "invite" else self.arguments[1:3]
        elif self.verb in ("start", "disk"):
            chosen = self.arguments[:1]
        elif self.verb in ("cut", "mend"):
            chosen = self.arguments[::2] if len(self.arguments) == 3 else ()
        elif self.verb in ("split", "network", "say", "ambush"):
            chosen = ()
        else:
            chosen = self.arguments
        return frozenset(chosen)


def parse_action(at_s: float, text: str) -> Action:
    """One action from its text, without the time.

    Raises:
        ValueError: names the text and the form that is allowed.
    """
    verb, *arguments = text.split()
    if verb not in FORMS:
        raise ValueError(f"'{verb}' is no action: write one of {', '.join(FORMS)}")
    least, most = _ARGUMENTS[verb]
    is_wrong = not least <= len(arguments) <= most
    if verb in ("cut", "mend") and len(arguments) == 3:
        is_wrong = is_wrong or arguments[1] not in (">", "-")
    elif verb == "mend":
        is_wrong = is_wrong or arguments != ["all"]
    elif verb == "start":
        is_wrong = is_wrong or arguments[1:] not in ([], ["losing", "votes"], ["losing", "everything"])
    elif verb == "ambush":
        is_wrong = is_wrong or arguments[2] not in FAULTS
    elif verb == "enter":
        is_wrong = is_wrong or (len(arguments) == 3 and arguments[2] not in ("active", "witness"))
    if is_wrong:
        raise ValueError(f"'{text}' is not understood: write {FORMS[verb]}")
    return Action(at_s, verb, tuple(arguments))
