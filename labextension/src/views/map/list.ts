/** A list of blocks that the Tab key reaches as one: the same cells while plans change, one of them current. */

import type { Translate } from '../../i18n'
import { h } from '../../dom'
import type { BlockState } from '../../wire'
import { makeCell, type Scene, setAttribute, showCell } from './cells'

export class BlockList {
  readonly element: HTMLElement
  private readonly cells = new Map<string, HTMLElement>()
  private order: string[] = []
  private current = ''

  constructor(
    private readonly t: Translate,
    name: string,
    /** Wraps a cell in what stands around it. */
    private readonly wrap: (cell: HTMLElement) => HTMLElement = cell => cell,
  ) {
    this.element = h('div', {
      role: 'listbox', 'aria-multiselectable': 'true', 'aria-orientation': 'horizontal', 'aria-label': name, class: 'blocks',
    })
  }

  get labels(): string[] {
    return this.order
  }

  cell(label: string): HTMLElement | undefined {
    return this.cells.get(label)
  }

  /** Draw these blocks, in this order. */
  show(scene: Scene, blocks: BlockState[], sign: (block: BlockState) => string): void {
    this.arrange(blocks.map(block => block.label))
    for (const block of blocks) {
      const cell = this.cells.get(block.label)
      if (cell) showCell(cell, this.t, scene, block, sign(block))
    }
    this.rove(this.order.includes(this.current) ? this.current : (this.order[0] ?? ''))
  }

  /** Make a block the one that Tab reaches. */
  rove(label: string): void {
    this.current = label
    for (const known of this.order) {
      const cell = this.cells.get(known)
      if (cell) setAttribute(cell, 'tabindex', known === label ? '0' : '-1')
    }
  }

  focus(label: string): void {
    this.rove(label)
    this.cells.get(label)?.focus({ preventScroll: false })
  }

  private arrange(labels: string[]): void {
    if (labels.length === this.order.length && labels.every((label, i) => label === this.order[i])) return
    this.order = labels
    const there = new Set(labels)
    for (const [label, cell] of this.cells) {
      if (there.has(label)) continue
      this.outermost(cell).remove()
      this.cells.delete(label)
    }
    // Cells that are in place stay untouched: they keep the focus, and their styles.
    let next = this.element.firstElementChild
    for (const label of labels) {
      const outer = this.outer(label)
      if (outer === next) next = next.nextElementSibling
      else this.element.insertBefore(outer, next)
    }
  }

  /** A block's cell with what is around it, made when there is none. */
  private outer(label: string): HTMLElement {
    const known = this.cells.get(label)
    if (known) return this.outermost(known)
    const cell = makeCell(label)
    this.cells.set(label, cell)
    return this.wrap(cell)
  }

  private outermost(cell: HTMLElement): HTMLElement {
    return cell.parentElement && cell.parentElement !== this.element ? cell.parentElement : cell
  }
}
