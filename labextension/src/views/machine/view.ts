/**
 * The machine as a picture, and on it the path that the bytes of one token take.
 *
 * The picture is drawn for the width there is, so that its words stay as large as the page's; it is drawn
 * anew for every state and width, while the button, the table and the focus stay.
 */

import { activeIn, h, replace, setText } from '../../dom'
import type { Shown, StateOf, Surroundings, View } from '../../view'
import { LostNote } from '../lost'
import { MACHINE_CSS } from './css'
import { draw } from './draw'
import { provenance } from './facts'
import { layout } from './layout'
import { notes } from './notes'
import { type Path, pathOf } from './path'
import { stepsPanel } from './steps'
import { tables } from './table'
import { Tooltip } from './tooltip'

type State = StateOf<'machine'>

const WIDTH_UNKNOWN = 640
const WIDTH_AT_LEAST = 300
const FEW_GPUS = 2

export const machineView: View<State> = (state, surroundings) => new MachinePicture(state, surroundings)

class MachinePicture implements Shown<State> {
  private readonly frame = h('div', { class: 'mv lit' })
  private readonly title = h('b')
  private readonly facts = h('span', { class: 'muted' })
  private readonly toggle: HTMLElement
  private readonly picture = h('div', { class: 'mv-picture' })
  private readonly steps = h('section', { class: 'mv-steps' })
  private readonly noPath: HTMLElement
  private readonly notes = h('div', { class: 'mv-notes' })
  private readonly tables = h('div')
  private readonly lostNote = new LostNote()
  private readonly tooltip = new Tooltip(this.frame)
  private readonly observer: ResizeObserver | null
  private path: Path
  private isLit = true
  private width = WIDTH_UNKNOWN

  constructor(
    private state: State,
    private readonly surroundings: Surroundings,
  ) {
    const { t } = surroundings
    this.toggle = h('button', { type: 'button', class: 'mv-toggle', onclick: () => this.setLit(!this.isLit) }, t('machinePath'))
    this.noPath = h('span', { class: 'muted mv-no-path' }, t('machineNoPath'))
    this.path = pathOf(state)
    this.build()
    this.observer = typeof ResizeObserver === 'undefined' ? null : new ResizeObserver(() => this.resized())
    this.observer?.observe(this.picture)
    this.update(state)
  }

  update(state: State): void {
    const { t } = this.surroundings
    this.state = state
    this.path = pathOf(state)
    const hasPath = this.path.steps.length > 0
    setText(this.title, state.name)
    setText(this.facts, provenance(state, t))
    this.frame.classList.toggle('many', state.devices.filter(device => device.kind === 'gpu').length > FEW_GPUS)
    this.toggle.hidden = !hasPath
    this.noPath.hidden = hasPath
    replace(this.steps, ...(hasPath ? stepsPanel(state, this.path, t) : []))
    replace(this.notes, ...notes(state, t).map(note => h('p', { class: 'note' }, note)))
    replace(this.tables, ...tables(state, this.path, t))
    this.setLit(this.isLit)
    this.draw()
  }

  event(): void {
    // All that happens to a machine comes as a new state.
  }

  lost(message: string): void {
    this.lostNote.show(message)
    this.frame.classList.add('still')
  }

  cleanup(): void {
    this.observer?.disconnect()
  }

  private build(): void {
    const { root, t } = this.surroundings
    const head = h('div', { class: 'mv-head' }, h('div', { class: 'mv-title' }, this.title, this.facts), this.noPath, this.toggle)
    const table = h('details', { class: 'mv-table' }, h('summary', {}, t('machineAsTable')), this.tables)
    this.frame.append(
      this.lostNote.element, head, h('div', { class: 'mv-body' }, this.picture, this.steps), this.legend(), this.notes, table, this.tooltip.element,
    )
    root.append(h('style', {}, MACHINE_CSS), this.frame)
  }

  private legend(): HTMLElement {
    const { t } = this.surroundings
    const entry = (swatch: string, words: string) => h('span', {}, h('span', { class: `mv-swatch ${swatch}` }), words)
    return h('div', { class: 'mv-legend' },
      entry('used', t('machineUsed')), entry('fill-other', t('machineOther')), entry('fill-free', t('machineFreeShort')),
      entry('rope', t('machineWidth')))
  }

  private setLit(isLit: boolean): void {
    this.isLit = isLit
    this.toggle.setAttribute('aria-pressed', String(isLit))
    const isShown = isLit && this.path.steps.length > 0
    this.frame.classList.toggle('lit', isShown)
    this.steps.hidden = !isShown
  }

  private resized(): void {
    const width = Math.floor(this.picture.clientWidth)
    // Hidden, as in another tab: what was drawn is as good as anything.
    if (!width || width === this.width) return
    this.width = width
    this.draw()
  }

  private draw(): void {
    const { t, view } = this.surroundings
    const width = Math.max(WIDTH_AT_LEAST, this.width)
    const focused = this.focusedKey()
    const placed = layout(this.state, this.path, width, t)
    const { svg, told } = draw(placed, { state: this.state, path: this.path, t, id: `mv-${view}` })
    replace(this.picture, svg)
    this.tooltip.tell(told)
    if (focused) this.thing(focused)?.focus({ preventScroll: true })
  }

  private focusedKey(): string | null {
    const active = activeIn(this.picture)
    return active && this.picture.contains(active) ? active.getAttribute('data-key') : null
  }

  private thing(key: string): SVGElement | undefined {
    return [...this.picture.querySelectorAll<SVGElement>('.mv-thing')].find(thing => thing.getAttribute('data-key') === key)
  }
}
