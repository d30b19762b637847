/** What is known of the thing under the pointer or the focus, in a box beside it. */

import { h, replace } from '../../dom'
import type { Told } from './draw'

const ASIDE_PX = 10

export class Tooltip {
  // The things say the same by their labels: said once is enough.
  readonly element = h('div', { class: 'mv-tip', role: 'tooltip', 'aria-hidden': 'true', hidden: true })
  private told: Told = new Map()

  /** `frame` is what the box is placed in; its picture is drawn anew with every state. */
  constructor(private readonly frame: HTMLElement) {
    for (const name of ['mouseover', 'focusin']) frame.addEventListener(name, event => this.at(event))
    for (const name of ['mouseleave', 'focusout']) frame.addEventListener(name, () => this.hide())
    frame.addEventListener('keydown', event => {
      if (event.key === 'Escape') this.hide()
    })
  }

  tell(told: Told): void {
    this.told = told
    this.hide()
  }

  hide(): void {
    this.element.hidden = true
  }

  private at(event: Event): void {
    const thing = event.target instanceof Element ? event.target.closest('.mv-thing') : null
    const lines = this.told.get(thing?.getAttribute('data-key') ?? '')
    if (!thing || !lines) {
      this.hide()
      return
    }
    replace(this.element, ...lines.map(line => h('div', {}, line)))
    this.element.hidden = false
    this.place(thing, event)
  }

  /** Below the thing, or at the pointer where the thing is a long line; inside of the frame. */
  private place(thing: Element, event: Event): void {
    const frame = this.frame.getBoundingClientRect()
    const box = thing.getBoundingClientRect()
    const isPointed = event instanceof MouseEvent
    const x = (isPointed ? event.clientX + ASIDE_PX : box.left) - frame.left
    const y = (isPointed ? event.clientY + 2 * ASIDE_PX : box.bottom + 4) - frame.top
    const most = Math.max(0, frame.width - this.element.offsetWidth)
    this.element.style.left = `${Math.max(0, Math.min(x, most))}px`
    this.element.style.top = `${Math.max(0, y)}px`
  }
}
