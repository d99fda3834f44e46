"""Schemathesis over the API's own description: nothing that can be sent makes the server fail."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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

            @settings(
                max_examples=300,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                database=None,
                derandomize=True,
            )
            @given(
                case=operation.as_strategy(),
                model=st.none() | st.sampled_from(["writer", "embed", "classify"]),
                task=st.none() | st.sampled_from(tasks),
            )
            def check(case: Any, model: str | None, task: str | None) -> None:
                if model and isinstance(case.body, dict) and "model" in case.body:
                    case.body["model"] = model
                if task and case.path_parameters:
                    case.path_parameters["model"] = task
                response = case.call(timeout=60)
                answered.append(response.status_code)
                assert response.status_code < 500, (response.status_code, response.text, case.body)

            check()
        worker = made.worker()
        assert worker.alive and not worker._running
    assert len(answered) > 2000 and {200, 400} <= set(answered)
