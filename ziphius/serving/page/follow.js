// Keeping the newest text in view, until the reader scrolls up.

const NEAR = 48;
const UP = new Set(["ArrowUp", "PageUp", "Home"]);

export class Follow {
  #box;
  #jump;
  #following = true;
  #held = false;
  #top = 0;
  #height = 0;

  /** `box` scrolls; `jump` is the button that leads back to its end. */
  constructor(box, jump) {
    this.#box = box;
    this.#jump = jump;
    box.addEventListener("scroll", () => {
      const moved = box.scrollTop - this.#top;
      // Shrinking content also moves the position up; that is not the reader's doing.
      const shrank = box.scrollHeight < this.#height;
      this.#note();
      // Small steps up begin near the end and must lead away from it: only a way down leads back.
      if (moved < -1 && !shrank) this.#following = false;
      else if (moved > 0 && this.#atEnd()) this.#following = true;
      this.#show();
    }, { passive: true });
    // These come before the scrolling they cause; without them the two would fight over a frame.
    const leave = (away) => (event) => {
      if (away(event) && box.scrollHeight > box.clientHeight) this.#following = false;
    };
    box.addEventListener("wheel", leave((event) => event.deltaY < 0), { passive: true });
    box.addEventListener("keydown", leave(({ key, target }) => UP.has(key) && !target.closest("textarea")));
    const hold = (held) => () => {
      this.#held = held;
      if (!held) this.#following = this.#atEnd();
    };
    box.addEventListener("touchstart", hold(true), { passive: true });
    for (const end of ["touchend", "touchcancel"]) box.addEventListener(end, hold(false), { passive: true });
    jump.addEventListener("click", () => {
      this.toEnd();
      jump.blur();
    });
    new ResizeObserver(() => this.grown()).observe(box);
  }

  /** The content has grown: go along if the reader was at the end. */
  grown() {
    if (this.#following && !this.#held) this.#box.scrollTop = this.#box.scrollHeight;
    this.#note();
    this.#show();
  }

  /** Go to the end and follow from there. */
  toEnd() {
    this.#following = true;
    this.grown();
  }

  /** Go to the start and stay there. */
  toStart() {
    this.#following = false;
    this.#box.scrollTop = 0;
    this.#note();
    this.#show();
  }

  // Where things stand now: what differs at the next scrolling is the reader's doing.
  #note() {
    this.#top = this.#box.scrollTop;
    this.#height = this.#box.scrollHeight;
  }

  #atEnd() {
    return this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight < NEAR;
  }

  #show() {
    this.#jump.hidden = this.#following || this.#atEnd();
  }
}
