"""The query parameters that every list takes."""

from typing import Annotated, Any

from fastapi import Query

from models.request import InvalidRequest

MAX_LIMIT = 100


class Page:
    """limit 1..100 rows, by age; order desc gives the newest first. Read limit + 1 of them."""

    def __init__(
        self, limit: Annotated[str, Query(pattern=r"^\d{1,3}$")] = "20", order: str = "desc"
    ) -> None:
        if not limit.isdecimal() or not 1 <= int(limit) <= MAX_LIMIT:
            raise InvalidRequest("limit", f"limit must be 1 to {MAX_LIMIT}")
        if order not in ("asc", "desc"):
            raise InvalidRequest("order", "order must be asc or desc")
        self.limit = int(limit)
        self.ascending = order == "asc"

    def json(self, found: list[dict[str, Any]], key: str = "id") -> dict[str, Any]:
        """The list object over limit + 1 rows that were read; key: what `after` takes."""
        data = found[: self.limit]
        return {
            "object": "list",
            "data": data,
            "first_id": data[0][key] if data else None,
            "last_id": data[-1][key] if data else None,
            "has_more": len(found) > self.limit,
        }
