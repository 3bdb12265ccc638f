"""What sources make on the host and remove at the end.

The server gives it to the user that it becomes (-u), who could not remove it otherwise.
"""

from __future__ import annotations

paths: set[str] = set()  # of all that is there now; sources add to it and take away
