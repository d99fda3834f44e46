"""Schemathesis over the API's own description: nothing that can be sent makes the server fail."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings

schemathesis = pytest.importorskip("schemathesis")


@pytest.mark.slow
def test_nothing_that_is_sent_makes_the_server_fail(start: Any, models: Any) -> None:
    answered: list[int] = []
    tasks = ("classify", "tag", "embed", "translate", "answer_span")
    made_of = {"writer": models["writer"](context=64)} | {task: models["answerer"](task) for task in tasks}
    with start(made_of) as made:
        schema = schemathesis.openapi.from_url(made.url + "/openapi.json")
        for operation in schema.get_all_operations():
            operation = operation.ok()

            @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @_given(operation)
            def check(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body and len(answered) % 2:
                    case.body["model"] = ("writer", "embed", "classify")[len(answered) % 3]
                if case.path_parameters and len(answered) % 2:
                    case.path_parameters["model"] = tasks[len(answered) % 5]
                response = case.call(timeout=60)
                answered.append(response.status_code)
                assert response.status_code < 500, (response.status_code, response.text, case.body)

            check()
        worker = made.worker()
        assert worker.alive and not worker._running
    assert len(answered) > 2000 and {200, 400} <= set(answered)


def _given(operation: Any) -> Any:
    from hypothesis import given

    return given(case=operation.as_strategy())
