"""Of several widths the widest in which a plan exists: fewer bits cost quality, and are not taken for speed alone."""

from planner.problem.evaluate import violations
from planner.problem.question import Question
from planner.problem.uniform import uniform_problem
from planner.proof.feasible import has_plan


def widest_that_fits(question: Question) -> Question:
    """Return the question in the first of its widths that is not proved to have no plan; in the last if all are.

    Args:
        question: as it is stored first, then its `narrower` ones.
    """
    widths = [question, *(question.packed(found) for found in question.narrower)]
    return next((asked for asked in widths if can_fit(asked) is not False), widths[-1])


def can_fit(question: Question) -> bool | None:
    """Return whether a question has a plan; None where no exact method says so."""
    problem, given = question.problem(), question.terms.given
    if given is not None:
        return not violations(problem, given)
    return has_plan(uniform_problem(problem) if question.strategy == "uniform" else problem)
