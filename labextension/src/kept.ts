/**
 * What a page forgets of elements that it loses for a moment: how far they were scrolled, and the focus.
 *
 * When a notebook draws an output anew the old place has gone before we hear of it, so both are noted as they
 * change, and put back where the elements stand next.
 */

import { activeIn } from './dom'

/** The `data-scrolls` of an element that is at its end and stays there; others have it empty. */
export const END = 'end'

type Focusable = Element & HTMLOrSVGElement

export class Kept {
  private readonly scrolled = new WeakMap<Element, { top: number; left: number }>()
  private focused: Focusable | null = null

  constructor(
    private readonly host: HTMLElement,
    private readonly root: ShadowRoot,
  ) {
    // A scroll event does not bubble.
    root.addEventListener('scroll', event => this.scroll(event.target), { capture: true, passive: true })
    root.addEventListener('focusin', event => (this.focused = event.target as Focusable))
    root.addEventListener('focusout', () => this.left())
  }

  /** Put back what there was. */
  restore(): void {
    for (const element of this.root.querySelectorAll<HTMLElement>('[data-scrolls]')) {
      const { top, left } = this.scrolled.get(element) ?? { top: 0, left: 0 }
      element.scrollTop = element.dataset['scrolls'] === END ? element.scrollHeight : top
      element.scrollLeft = left
    }
    if (this.focused?.isConnected && this.isFocusFree()) this.focused.focus({ preventScroll: true })
  }

  private scroll(target: EventTarget | null): void {
    if (!this.host.isConnected || !(target instanceof Element) || !target.hasAttribute('data-scrolls')) return
    this.scrolled.set(target, { top: target.scrollTop, left: target.scrollLeft })
  }

  /** The focus left an element; some browsers say so when it was the element that went. */
  private left(): void {
    const { focused } = this
    // By then what was taken away and put back has its focus again.
    setTimeout(() => {
      if (this.focused === focused && this.host.isConnected && activeIn(this.root) !== focused) this.focused = null
    })
  }

  /** Whether nobody went on to something else. */
  private isFocusFree(): boolean {
    const active = document.activeElement
    return !active || active === document.body || active.contains(this.host)
  }
}
