"""A server that measures texts by goals, each a number: a point in goal space for each text.

    cd examples/steerability
    uvicorn goalspace_server:app --host 127.0.0.1 --port 12121 --workers 2
    curl -s localhost:12121/goalspace -H 'content-type: application/json' -d '["A text.", "Another one."]'

Environment: GOAL_DIMENSIONS, NORMALIZATION_PATH and others; docs/steerability.md lists them.
"""

from __future__ import annotations

import sys

from conch.errors import ConchError
from conch.reward_server.goalspace_app import GoalspaceSettings, goalspace_app

try:
    app = goalspace_app(GoalspaceSettings.from_environment())
except ConchError as error:
    sys.exit(f"error: {error}")
