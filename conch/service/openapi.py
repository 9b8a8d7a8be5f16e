"""What the page about the service says of refusals, and how the key is sent."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from conch.service.protocol import KEY_HEADER

_REFUSALS = {
    400: "The request cannot be read: no JSON, an unknown field, a value of the wrong type.",
    401: "No key, or another than the service's.",
    404: "There is no such run, sample or version.",
    408: "The request did not come in within its time.",
    409: "The state forbids it: no run, one that has ended or failed (with its reason), one that is under "
    "way; or the sample is another client's, has other tokens, or was rewarded with another number.",
    410: "Too late: the samples have lapsed, or their group has ended.",
    413: "The request is larger than the service's `max_request_mb`.",
    422: "What is asked for cannot be: settings that do not fit, a prompt that is too long, rewards that are "
    "too few, too many or no numbers.",
    429: "Too much is under way: reward something first, or come again.",
    503: "Not yet: the model is being loaded, an update takes its time, the service stops. Come again.",
}
_EVERYWHERE = (401, 408, 413)
_OF_PATHS = {
    "/start": (400, 409, 422, 429, 503),
    "/resume": (400, 404, 409, 422, 429, 503),
    "/stop": (409, 503),
    "/status": (503,),
    "/runs": (),
    "/training_settings": (409, 503),
    "/completions": (400, 404, 409, 410, 422, 429, 503),
    "/completions/batch": (400, 409, 503),
    "/rewards": (400, 404, 409, 410, 422, 503),
    "/rewards/batch": (400, 503),
    "/model": (400, 404, 409, 503),
    "/events": (400, 409, 503),
}
_RETRIED = (429, 503)
_REASON = "Reason"
_RANGES = {
    "206": {"description": "The part that `range` asks for."},
    "416": {"description": "`range` begins behind the end of the file."},
}
_CONTENT = {"/model": "application/zip", "/events": "text/event-stream"}


def describe_refusals(app: FastAPI) -> None:
    """Have the schema of `app` name every status of its addresses, and the ways to send a key."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        schema = make()
        if _REASON not in schema["components"]["schemas"]:
            _complete(schema)
        return schema

    app.openapi = openapi  # as FastAPI has its schema extended


def _complete(schema: dict[str, Any]) -> None:
    components = schema["components"]
    # FastAPI's own of what cannot be read, which is refused with 400 and one sentence.
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["schemas"][_REASON] = {
        "type": "object",
        "title": _REASON,
        "properties": {"detail": {"type": "string", "description": "Why, in a sentence."}},
        "required": ["detail"],
    }
    components["securitySchemes"] = {
        "key": {"type": "apiKey", "in": "header", "name": KEY_HEADER},
        "bearer": {"type": "http", "scheme": "bearer"},
        "password": {
            "type": "http",
            "scheme": "basic",
            "description": "The key as the password of any user.",
        },
    }
    schema["security"] = [{"key": []}, {"bearer": []}, {"password": []}]
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"] = _responses(path, operation["responses"]["200"])


def _responses(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """All responses of an address, by status. answer: that of success."""
    if path in _CONTENT:
        answer = {**answer, "content": {_CONTENT[path]: {"schema": {"type": "string"}}}}
    refusals = {str(status): _refusal(status) for status in sorted({*_EVERYWHERE, *_OF_PATHS[path]})}
    return {"200": answer, **(_RANGES if path == "/model" else {}), **refusals}


def _refusal(status: int) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": _REFUSALS[status],
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_REASON}"}}},
    }
    if status in _RETRIED:
        response["headers"] = {
            "retry-after": {"description": "When to come again, in seconds.", "schema": {"type": "integer"}}
        }
    return response
