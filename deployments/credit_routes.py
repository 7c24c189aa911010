"""The routes that show an account's credits and every transfer of them."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy import Engine

from credits.accounts import AccountId
from credits.ledger import LedgerEntry, list_entries
from deployments.authentication import Authenticator, account_of, keyed_router
from deployments.database import reader
from deployments.paging import Page
from deployments.wire import ENTRY_COLUMNS, credits_json, entry_json
from jobs.store import jobs_of_reservations

CSV_PAGE = 500


class CreditRoutes:
    """Handlers over the ledger; they only read."""

    def __init__(self, engine: Engine, authenticate: Authenticator) -> None:
        self.engine = engine
        self.authenticate = authenticate

    def router(self) -> APIRouter:
        """All routes; each needs an API key."""
        router = keyed_router(self.authenticate)
        router.add_api_route("/v1/credits", self.get_credits, methods=["GET"])
        router.add_api_route("/v1/credits/entries", self.list_entries, methods=["GET"])
        router.add_api_route(
            "/v1/credits/entries.csv",
            self.export_entries,
            methods=["GET"],
            response_class=StreamingResponse,
            responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
        )
        return router

    def get_credits(self, request: Request) -> dict[str, Any]:
        """What the account has, holds in reservations and has spent."""
        return credits_json(account_of(request))

    def list_entries(
        self,
        request: Request,
        page: Annotated[Page, Depends()],
        after: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
    ) -> dict[str, Any]:
        """A page of the account's transfers; `after` is the number of the last one seen."""
        account = account_of(request)
        found = self._read(account.id, after, page.limit + 1, ascending=page.ascending)
        return page.json(found, key="number")

    def export_entries(self, request: Request) -> StreamingResponse:
        """Every transfer of the account from the first, as CSV."""
        account = account_of(request)
        headers = {"content-disposition": 'attachment; filename="credits.csv"'}
        return StreamingResponse(self._csv(account.id), media_type="text/csv", headers=headers)

    def _csv(self, account_id: AccountId) -> Iterator[str]:
        after = None
        yield _csv_lines([ENTRY_COLUMNS])
        while found := self._read(account_id, after, CSV_PAGE, ascending=True):
            yield _csv_lines([[entry[name] for name in ENTRY_COLUMNS] for entry in found])
            after = found[-1]["number"]

    def _read(
        self, account_id: AccountId, after: int | None, limit: int, *, ascending: bool
    ) -> list[dict[str, Any]]:
        with reader(self.engine).begin() as connection:
            found: list[LedgerEntry] = list_entries(
                connection, account_id, after=after, limit=limit, ascending=ascending
            )
            reservations = [e.reservation_id for e in found if e.reservation_id is not None]
            videos = jobs_of_reservations(connection, reservations)
        return [entry_json(entry, videos.get(entry.reservation_id or "")) for entry in found]


def _csv_lines(rows: Sequence[Sequence[Any]]) -> str:
    lines = io.StringIO()
    csv.writer(lines).writerows(rows)
    return lines.getvalue()
