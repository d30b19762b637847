/** One block as a cell of a bar or of the strip: an option of a list, with its colour, sign and marks. */

import { h, setText } from '../../dom'
import type { Translate } from '../../i18n'
import type { BlockState, PlanState } from '../../wire'
import { fillOfBlock } from './facts'
import { blockLines, deviceTitle } from './words'

export const TIED_MARK = '∞'
export const EXPERTS_MARK = '∷'
export const MOVED_MARK = '●'

/** What a list of blocks is drawn from. */
export interface Scene {
  plan: PlanState
  /** The plan that is in force: blocks whose home is another one are marked. */
  base: PlanState
  selected: ReadonlySet<string>
  canEdit: boolean
  /** What is said of each block, once for all its cells. */
  names: Map<string, string>
}

export function makeCell(label: string): HTMLElement {
  const tag = h('span', { class: 'tag', 'aria-hidden': 'true' })
  return h('div', { class: 'block', role: 'option', 'data-label': label, tabindex: '-1' }, tag)
}

/** Draw a block; `sign` is what is written in it. */
export function showCell(cell: HTMLElement, t: Translate, scene: Scene, block: BlockState, sign: string): void {
  const moved = movedFrom(scene, block)
  const isSelected = scene.selected.has(block.label)
  setClass(cell, `block fill-${fillOfBlock(block)}${isSelected ? ' selected' : ''}${moved ? ' moved' : ''}`)
  setAttribute(cell, 'aria-selected', String(isSelected))
  setAttribute(cell, 'aria-disabled', String(!scene.canEdit))
  setAttribute(cell, 'aria-label', nameOf(t, scene, block))
  // The style sheet draws marks: they are said in words, and are no part of the name.
  setAttribute(cell, 'data-mark', `${moved ? MOVED_MARK : ''}${marksOf(block)}`)
  if (cell.firstElementChild) setText(cell.firstElementChild, sign)
}

function nameOf(t: Translate, scene: Scene, block: BlockState): string {
  const known = scene.names.get(block.label)
  if (known !== undefined) return known
  const name = cellLines(t, scene, block).join(t('mapStop'))
  scene.names.set(block.label, name)
  return name
}

/** What the tooltip and assistive technology say of a block. */
export function cellLines(t: Translate, scene: Scene, block: BlockState): string[] {
  const moved = movedFrom(scene, block)
  const lines = blockLines(t, scene.plan, block)
  return moved ? [...lines, t('editMovedFrom', { device: deviceTitle(t, moved) })] : lines
}

function marksOf(block: BlockState): string {
  return `${block.tied_to.length ? TIED_MARK : ''}${block.experts ? EXPERTS_MARK : ''}`
}

/** Where a block is in force, when it is asked for elsewhere. */
function movedFrom(scene: Scene, block: BlockState): string {
  if (scene.plan === scene.base) return ''
  const before = homesIn(scene.base).get(block.label)
  return before !== undefined && before !== block.home ? before : ''
}

const homesOfPlan = new WeakMap<PlanState, Map<string, string>>()

function homesIn(plan: PlanState): Map<string, string> {
  const known = homesOfPlan.get(plan)
  if (known) return known
  const homes = new Map(plan.blocks.map(block => [block.label, block.home]))
  homesOfPlan.set(plan, homes)
  return homes
}

export function setClass(element: Element, value: string): void {
  if (element.className !== value) element.className = value
}

export function setAttribute(element: Element, name: string, value: string): void {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value)
}
