"""HiGHS as planners use it: silent, small, the same answer every time.

highspy rather than SciPy's `milp`: models are changed and solved again (cuts, cutoffs, tightened limits), threads and
heuristics can be set, and it needs NumPy alone.
"""

from __future__ import annotations

import highspy


def quiet_highs() -> highspy.Highs:
    """A solver that prints nothing and uses one thread: plans are made beside running models.

    The base class, because `Highs.__init__` prints a banner before any option can be set (highspy 1.16).
    """
    base: type[highspy.Highs] = highspy.Highs.__mro__[1]
    highs = base()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("parallel", "off")
    # These programs are small: what prepares for large ones took half of the time.
    highs.setOptionValue("presolve", "off")
    highs.setOptionValue("mip_detect_symmetry", False)
    for heuristic in ("feasibility_jump", "rins", "rens", "root_reduced_cost"):
        highs.setOptionValue(f"mip_heuristic_run_{heuristic}", False)
    return highs
