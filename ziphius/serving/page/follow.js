// Keeping the newest text in view, until the reader scrolls up.

const NEAR = 48;
// Milliseconds after leaving in which word of earlier scrolling to the end may still arrive.
const SETTLE = 200;
const UP = new Set(["ArrowUp", "PageUp", "Home"]);

export class Follow {
  #box;
  #jump;
  #following = true;
  #held = false;
  #left = -SETTLE;
  #height = 0;

  /** `box` scrolls; `jump` is the button that leads back to its end. */
  constructor(box, jump) {
    this.#box = box;
    this.#jump = jump;
    let top = 0;
    box.addEventListener("scroll", () => {
      const up = box.scrollTop < top - 1;
      const down = box.scrollTop > top;
      // Shrinking content also moves the position up; that is not the reader's doing.
      const shrank = box.scrollHeight < this.#height;
      top = box.scrollTop;
      this.#height = box.scrollHeight;
      // Small steps up begin near the end and must lead away from it: only a way down leads back.
      if (up && !shrank) this.#leave();
      else if (down && this.#atEnd() && performance.now() - this.#left > SETTLE) this.#following = true;
      this.#show();
    }, { passive: true });
    // These come before the scrolling they cause; without them the two would fight over a frame.
    const leave = (away) => (event) => {
      if (away(event) && box.scrollHeight > box.clientHeight) this.#leave();
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
    this.#height = this.#box.scrollHeight;
    if (this.#following && !this.#held) this.#box.scrollTop = this.#box.scrollHeight;
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
    this.#show();
  }

  #leave() {
    this.#following = false;
    this.#left = performance.now();
  }

  #atEnd() {
    return this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight < NEAR;
  }

  #show() {
    this.#jump.hidden = this.#following || this.#atEnd();
  }
}
