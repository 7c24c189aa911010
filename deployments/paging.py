"""The query parameters that every list takes."""

from typing import Annotated, Any, Literal

from fastapi import Query


class Page:
    """limit 1..100 rows, by age; order desc gives the newest first. Read limit + 1 of them."""

    def __init__(
        self,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> None:
        self.limit = limit
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
