// Keeping the newest text in view, until the reader scrolls up.

const NEAR = 48;

export class Follow {
  #box;
  #jump;
  #following = true;
  #height = 0;

  /** `box` scrolls; `jump` is the button that leads back to its end. */
  constructor(box, jump) {
    this.#box = box;
    this.#jump = jump;
    let top = 0;
    box.addEventListener("scroll", () => {
      const up = box.scrollTop < top - 1;
      // Shrinking content also moves the position up; that is not the reader's doing.
      const shrank = box.scrollHeight < this.#height;
      top = box.scrollTop;
      this.#height = box.scrollHeight;
      // Up counts first: small steps up begin near the end, and must lead away from it.
      if (up && !shrank) this.#following = false;
      else if (this.#atEnd()) this.#following = true;
      this.#show();
    }, { passive: true });
    const leave = (event) => {
      if (event.deltaY < 0 && box.scrollHeight > box.clientHeight) this.#following = false;
    };
    box.addEventListener("wheel", leave, { passive: true });
    jump.addEventListener("click", () => {
      this.toEnd();
      jump.blur();
    });
    new ResizeObserver(() => this.grown()).observe(box);
  }

  /** The content has grown: go along if the reader was at the end. */
  grown() {
    this.#height = this.#box.scrollHeight;
    if (this.#following) this.#box.scrollTop = this.#box.scrollHeight;
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

  #atEnd() {
    return this.#box.scrollHeight - this.#box.scrollTop - this.#box.clientHeight < NEAR;
  }

  #show() {
    this.#jump.hidden = this.#following || this.#atEnd();
  }
}
